"""Signed requests, and what Python's libraries say of each.

The clock stands at NOW for all of them. A case is a request as it would arrive;
"signed" says what went into it, where a library (or the scheme's own rule)
signed it whole and unchanged.
"""

import base64
import datetime
import hashlib
import hmac
import json
import sys

import http_message_signatures as hms
import slack_sdk.signature
import standardwebhooks
import stripe
import svix.webhooks
import time_machine
from gidgethub import sansio

NOW = 1_700_000_000
ID = "msg_2KWPBgLlAfxdpx2AI54pPJ85f4W"
URL = "https://hooks.example.com/in/orders?kind=paid&x=%20y"
WHSEC = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OLD = "whsec_" + base64.b64encode(bytes(range(32))).decode()
TEXT = "It's a Secret to Everybody"

# A mebibyte is written down as what it repeats.
TIMES = 1024 * 128

BODIES = {
    "json": b'{"type":"invoice.paid","object":"event","amount":1200}',
    "empty": b"",
    "emoji": '{"object":"event","note":"gr\u00fc\u00df dich \U0001f980"}'.encode(),
    "spaces": b'{ "object" : "event",\r\n\t"b": [1, 2 ]}\n',
    "binary": bytes(range(256)),
    "bom": b"\xef\xbb\xbf" + b'{"object":"event"}',
    "mebibyte": b"buttress" * TIMES,
}


def mac(key, data, algorithm="sha256"):
    return hmac.new(key, data, algorithm)


def whsec(secret):
    return base64.b64decode(secret.removeprefix("whsec_"))


def v1(secret, ident, stamp, body):
    signed = f"{ident}.{stamp}.".encode() + body
    return "v1," + base64.b64encode(mac(whsec(secret), signed).digest()).decode()


def at(stamp):
    return datetime.datetime.fromtimestamp(stamp, datetime.timezone.utc)


cases = []


def case(name, scheme, secret, headers, body, signed=None):
    cases.append(
        {
            "name": f"{scheme}: {name}",
            "scheme": scheme,
            "secret": secret,
            "now": NOW,
            "url": URL,
            "headers": [[k, v] for k, v in headers],
            "body": body,
            "signed": signed,
            "verdicts": {},
        }
    )


def standard(scheme, library):
    prefix = {"standard": "webhook", "svix": "svix"}[scheme]

    def headers(ident=ID, stamp=str(NOW), signature=""):
        return [
            (f"{prefix}-id", ident),
            (f"{prefix}-timestamp", stamp),
            (f"{prefix}-signature", signature),
        ]

    def signature(body, ident=ID, stamp=NOW, secret=WHSEC):
        try:
            # Their own, where they sign such a body.
            return library(secret).sign(ident, at(stamp), body.decode())
        except UnicodeDecodeError:
            return v1(secret, ident, stamp, body)

    for kind, body in BODIES.items():
        whole = {"id": ID, "timestamp": NOW, "secrets": [WHSEC]}
        case(kind, scheme, WHSEC, headers(signature=signature(body)), body, whole)
    body = BODIES["json"]
    good = signature(body)
    old = signature(body, secret=OLD)
    both = {"id": ID, "timestamp": NOW, "secrets": [OLD, WHSEC]}
    case("two secrets", scheme, WHSEC, headers(signature=f"{old} {good}"), body, both)
    case("another secret", scheme, WHSEC, headers(signature=old), body)
    wrong = "v1," + base64.b64encode(bytes(32)).decode()
    asymmetric = "v1a," + base64.b64encode(bytes(64)).decode()
    lists = {
        "last of four": f"{wrong} {wrong} {wrong} {good}",
        "after v1a": f"{asymmetric} {good}",
        "only v1a": asymmetric,
        "empty": "",
        "a word": "garbage",
        "a word before": f"garbage {good}",
        "a word after": f"{good} garbage",
        "not base64": "v1,!!!!",
        "without padding": good.rstrip("="),
        "url alphabet": good.replace("+", "-").replace("/", "_"),
        "without version": good.removeprefix("v1,"),
        "another version": good.replace("v1,", "v2,"),
        "short": good[:20],
        "in capitals": good.upper(),
        "with a comma": good.replace(" ", ",") + "," + wrong,
    }
    for name, value in lists.items():
        case(f"signature {name}", scheme, WHSEC, headers(signature=value), body)
    for off in (-301, -300, 300, 301):
        signed = signature(body, stamp=NOW + off)
        case(f"{off:+} s", scheme, WHSEC, headers(stamp=str(NOW + off), signature=signed), body)
    # Signed over the very text, and over the number that some read in it.
    for text in (f"+{NOW}", f"{NOW}.9", f"{NOW}abc", f" {NOW}", f"0{NOW}", "", "abc", "-1", "1e9"):
        for what, stamp in (("text", text), ("number", NOW)):
            signed = v1(WHSEC, ID, stamp, body)
            name = f"timestamp {text!r}, its {what} signed"
            case(name, scheme, WHSEC, headers(stamp=text, signature=signed), body)
    case("changed body", scheme, WHSEC, headers(signature=good), body + b" ")
    case("changed id", scheme, WHSEC, headers(ident="msg_x", signature=good), body)
    case("changed time", scheme, WHSEC, headers(stamp=str(NOW + 1), signature=good), body)
    for index in range(3):
        left = headers(signature=good)
        name = left.pop(index)[0]
        case(f"without {name}", scheme, WHSEC, left, body)


def stripes():
    def header(body, stamp=NOW, secret=WHSEC, key="v1"):
        signed = f"{stamp}.".encode() + body
        return f"{key}={mac(secret.encode(), signed).hexdigest()}"

    def with_header(name, value, body, signed=None):
        case(name, "stripe", WHSEC, [("stripe-signature", value)], body, signed)

    for kind, body in BODIES.items():
        try:
            # Their own, where they sign such a body.
            text = f"{NOW}.{body.decode()}"
            computed = stripe.WebhookSignature._compute_signature(text, WHSEC)
            value = f"t={NOW},v1={computed}"
        except UnicodeDecodeError:
            value = f"t={NOW},{header(body)}"
        with_header(kind, value, body, {"id": ID, "timestamp": NOW, "secrets": [WHSEC]})
    body = BODIES["json"]
    good, old = header(body), header(body, secret=OLD)
    both = {"id": ID, "timestamp": NOW, "secrets": [OLD, WHSEC]}
    with_header("two secrets", f"t={NOW},{old},{good}", body, both)
    forms = {
        "another secret": f"t={NOW},{old}",
        "v0 between": f"t={NOW},{header(body, key='v0')},{good}",
        "only v0": f"t={NOW},{header(body, key='v0')}",
        "signature first": f"{good},t={NOW}",
        "two times, the first signed": f"t={NOW},t={NOW - 9},{good}",
        "two times, the last signed": f"t={NOW - 9},t={NOW},{good}",
        "without time": good,
        "without signature": f"t={NOW}",
        "empty": "",
        "a word": "garbage",
        "spaces after commas": f"t={NOW}, {good}",
        "in capitals": f"t={NOW},v1={good[3:].upper()}",
        "signature cut": f"t={NOW},{good[:-2]}",
        "signature longer": f"t={NOW},{good}00",
        "a comma at the end": f"t={NOW},{good},",
    }
    for name, value in forms.items():
        with_header(name, value, body)
    for off in (-301, -300, 300, 301):
        with_header(f"{off:+} s", f"t={NOW + off},{header(body, NOW + off)}", body)
    for text in (f"+{NOW}", f"{NOW}.9", f"{NOW}abc", "", "abc", "-1"):
        for what, stamp in (("text", text), ("number", NOW)):
            with_header(f"time {text!r}, its {what} signed", f"t={text},{header(body, stamp)}", body)
    with_header("changed body", f"t={NOW},{good}", body + b" ")
    with_header("changed time", f"t={NOW + 1},{good}", body)


def slack():
    signer = slack_sdk.signature.SignatureVerifier(TEXT)

    def signature(body, stamp=NOW):
        try:
            return signer.generate_signature(timestamp=str(stamp), body=body)
        except UnicodeDecodeError:
            return "v0=" + mac(TEXT.encode(), f"v0:{stamp}:".encode() + body).hexdigest()

    def headers(value, stamp=str(NOW)):
        return [("x-slack-request-timestamp", stamp), ("x-slack-signature", value)]

    for kind, body in BODIES.items():
        whole = {"id": ID, "timestamp": NOW, "secrets": [TEXT]}
        case(kind, "slack", TEXT, headers(signature(body)), body, whole)
    body = BODIES["json"]
    good = signature(body)
    forms = {
        "another version": good.replace("v0=", "v1="),
        "without version": good.removeprefix("v0="),
        "empty": "",
        "in capitals": "v0=" + good[3:].upper(),
        "cut": good[:-2],
        "longer": good + "00",
        "a word": "garbage",
    }
    for name, value in forms.items():
        case(f"signature {name}", "slack", TEXT, headers(value), body)
    for off in (-301, -300, 300, 301):
        case(f"{off:+} s", "slack", TEXT, headers(signature(body, NOW + off), str(NOW + off)), body)
    for text in (f"+{NOW}", f"{NOW}.9", f"{NOW}abc", "", "abc"):
        case(f"timestamp {text!r}", "slack", TEXT, headers(signature(body, text), text), body)
    case("changed body", "slack", TEXT, headers(good), body + b" ")
    case("changed time", "slack", TEXT, headers(good, str(NOW + 1)), body)
    case("without time", "slack", TEXT, headers(good)[1:], body)
    case("without signature", "slack", TEXT, headers(good)[:1], body)


def github():
    def header(value):
        return [("x-hub-signature-256", value)]

    def signature(body, secret=TEXT):
        return "sha256=" + mac(secret.encode(), body).hexdigest()

    for kind, body in BODIES.items():
        whole = {"id": ID, "timestamp": NOW, "secrets": [TEXT]}
        case(kind, "github", TEXT, header(signature(body)), body, whole)
    body = BODIES["json"]
    good = signature(body)
    sha1 = "sha1=" + mac(TEXT.encode(), body, "sha1").hexdigest()
    forms = {
        "another secret": signature(body, WHSEC),
        "by sha1": sha1,
        "sha1 named sha256": "sha256=" + sha1[5:],
        "without algorithm": good.removeprefix("sha256="),
        "algorithm in capitals": good.replace("sha256", "SHA256"),
        "in capitals": "sha256=" + good[7:].upper(),
        "cut": good[:-2],
        "longer": good + "00",
        "empty": "",
        "a word": "garbage",
    }
    for name, value in forms.items():
        case(f"signature {name}", "github", TEXT, header(value), body)
    case("changed body", "github", TEXT, header(good), body + b" ")
    case("only the old header", "github", TEXT, [("x-hub-signature", sha1)], body)


class Request:
    def __init__(self, method, url, headers):
        self.method, self.url, self.headers = method, url, headers


class Keys(hms.HTTPSignatureKeyResolver):
    def resolve_private_key(self, key_id):
        return TEXT.encode()

    resolve_public_key = resolve_private_key


COVERED = ("@method", "@authority", "@path", "@query", "content-digest")


def signatures():
    def digest(body):
        return "sha-256=:" + base64.b64encode(hashlib.sha256(body).digest()).decode() + ":"

    def signed(body, created=NOW, covered=COVERED, method="POST", url=URL, **more):
        request = Request(method, url, {"content-digest": digest(body), "date": "Tue, 14 Nov 2023 22:13:20 GMT"})
        signer = hms.HTTPMessageSigner(signature_algorithm=hms.algorithms.HMAC_SHA256, key_resolver=Keys())
        signer.sign(
            request,
            key_id="key-1",
            created=at(created),
            label="sig1",
            covered_component_ids=covered,
            use_existing_digest=True,
            **more,
        )
        return [(name.lower(), value) for name, value in request.headers.items()]

    def add(name, headers, body):
        case(name, "http-signatures", TEXT, headers, body)

    for kind, body in BODIES.items():
        add(kind, signed(body), body)
    body = BODIES["json"]
    add("without alg", signed(body, include_alg=False), body)
    add("with nonce and tag", signed(body, nonce="n-1", tag="buttress"), body)
    add("expires later", signed(body, expires=at(NOW + 60)), body)
    add("expired", signed(body, expires=at(NOW - 1)), body)
    add("more covered", signed(body, covered=(*COVERED, "date")), body)
    for left in COVERED:
        covered = tuple(component for component in COVERED if component != left)
        add(f"without {left}", signed(body, covered=covered), body)
    add("nothing covered", signed(body, covered=()), body)
    for off in (-301, -300, 300, 301):
        add(f"{off:+} s", signed(body, created=NOW + off), body)
    add("another method", signed(body, method="PUT"), body)
    add("another path", signed(body, url=URL.replace("/in/", "/out/")), body)
    add("another query", signed(body, url=URL.replace("paid", "sent")), body)
    add("another host", signed(body, url=URL.replace("hooks.", "evil.")), body)
    add("the default port", signed(body, url=URL.replace(".com/", ".com:443/")), body)
    add("a host in capitals", signed(body, url=URL.replace("hooks", "HOOKS")), body)
    add("changed body", signed(body), body + b" ")
    add("digest and body changed", [
        (name, digest(b"x") if name == "content-digest" else value) for name, value in signed(body)
    ], b"x")
    for name in ("signature", "signature-input", "content-digest"):
        add(f"without {name} in the request", [h for h in signed(body) if h[0] != name], body)


def judged_by_python():
    def standardly(library, **options):
        def judge(case):
            headers = dict(case["headers"])
            library(case["secret"]).verify(case["body"], headers, **options)

        return judge

    def stripely(case):
        header = dict(case["headers"]).get("stripe-signature")
        stripe.WebhookSignature.verify_header(case["body"].decode(), header, case["secret"], 300)

    def slackly(case):
        verifier = slack_sdk.signature.SignatureVerifier(case["secret"])
        if not verifier.is_valid_request(case["body"], dict(case["headers"])):
            raise ValueError("refused")

    def gidgethubly(case):
        headers = dict(case["headers"])
        sansio.validate_event(
            case["body"], signature=headers["x-hub-signature-256"], secret=case["secret"]
        )

    def signaturely(case):
        request = Request("POST", case["url"], dict(case["headers"]))
        verifier = hms.HTTPMessageVerifier(signature_algorithm=hms.algorithms.HMAC_SHA256, key_resolver=Keys())
        verifier.verify(
            request,
            max_age=datetime.timedelta(seconds=300),
            body=case["body"],
            require_components=COVERED,
        )

    return {
        "standard": {"standardwebhooks (Python)": standardly(standardwebhooks.Webhook, json_parse=False)},
        "svix": {"svix (Python)": standardly(svix.webhooks.Webhook)},
        "stripe": {"stripe (Python)": stripely},
        "slack": {"slack_sdk (Python)": slackly},
        "github": {"gidgethub (Python)": gidgethubly},
        "http-signatures": {"http-message-signatures (Python)": signaturely},
    }


standard("standard", standardwebhooks.Webhook)
standard("svix", standardwebhooks.Webhook)
stripes()
slack()
github()
signatures()

with open(sys.argv[1]) as ours:
    for index, each in enumerate(json.load(ours)):
        body = base64.b64decode(each["body"])
        case(f"ours, {index % 3}", each["scheme"], each["secret"], each["headers"], body)

judges = judged_by_python()
with time_machine.travel(NOW, tick=False):
    for each in cases:
        for library, judge in judges[each["scheme"]].items():
            try:
                judge(each)
                each["verdicts"][library] = True
            except Exception as error:  # noqa: BLE001, what they raise is all their own
                each["verdicts"][library] = False
                if "-v" in sys.argv:
                    print(each["name"], library, type(error).__name__, error, file=sys.stderr)
for each in cases:
    times = TIMES if each["body"] == BODIES["mebibyte"] else 1
    each["times"] = times
    each["body"] = base64.b64encode(each["body"][: len(each["body"]) // times]).decode()
json.dump(cases, sys.stdout)
