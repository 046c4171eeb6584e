// Adds what JavaScript's libraries say of each request.

import { readFileSync } from "node:fs";
import { createHmac } from "node:crypto";
import { verify as octokit } from "@octokit/webhooks-methods";
import { isValidSlackRequest } from "@slack/bolt/dist/receivers/verify-request.js";
import { httpbis } from "http-message-signatures";
import { Webhook as Standard } from "standardwebhooks";
import Stripe from "stripe";
import { Webhook as Svix } from "svix";

const cases = JSON.parse(readFileSync(process.argv[2], "utf8"));
const stripe = new Stripe("sk_test_none");

const judges = {
  standard: { "standardwebhooks (JavaScript)": ({ secret, headers, body }) => new Standard(secret).verify(body, headers, { jsonParse: false }) },
  svix: {
    "svix (JavaScript)": ({ secret, headers, body }) => {
      try {
        new Svix(secret).verify(body, headers);
      } catch (error) {
        // It parses what it has verified, whatever that is.
        if (!(error instanceof SyntaxError)) throw error;
      }
    },
  },
  stripe: {
    "stripe (JavaScript)": ({ secret, headers, body }) =>
      stripe.webhooks.signature.verifyHeader(body, headers["stripe-signature"], secret, 300),
  },
  slack: {
    "@slack/bolt (JavaScript)": ({ secret, headers, body, now }) =>
      isValidSlackRequest({ signingSecret: secret, headers, body: body.toString(), nowMilliseconds: now * 1000 }),
  },
  github: {
    "@octokit/webhooks-methods (JavaScript)": ({ secret, headers, body }) =>
      octokit(secret, body.toString(), headers["x-hub-signature-256"]),
  },
  "http-signatures": {
    "http-message-signatures (JavaScript)": async ({ secret, headers, body, url }) =>
      httpbis.verifyMessage(
        {
          keyLookup: async () => ({
            id: "key-1",
            algs: ["hmac-sha256"],
            verify: async (data, signature) => createHmac("sha256", secret).update(data).digest().equals(signature),
          }),
          requiredFields: ["@method", "@authority", "@path", "@query", "content-digest"],
          maxAge: 300,
        },
        { method: "POST", url, headers, body },
      ),
  },
};

for (const each of cases) {
  const stop = each.now * 1000;
  Date.now = () => stop;
  const request = {
    ...each,
    headers: Object.fromEntries(each.headers),
    body: Buffer.concat(Array(each.times).fill(Buffer.from(each.body, "base64"))),
  };
  for (const [library, judge] of Object.entries(judges[each.scheme])) {
    try {
      const verdict = await judge(request);
      // Most throw; some say false, or nothing.
      each.verdicts[library] = verdict !== false && verdict !== null;
    } catch (error) {
      each.verdicts[library] = false;
      if (process.argv[3]) console.error(each.name, library, String(error).split("\n")[0]);
    }
  }
}

const lines = cases.map((each) => JSON.stringify(each));
console.log(`[\n${lines.join(",\n")}\n]`);
