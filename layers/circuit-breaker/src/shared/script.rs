//! The two scripts, and how they are asked.

use std::time::Duration;

use buttress_redis::{Call, Key, Script};

use super::record::{NodeId, Op, Reply, Request, Seen, Standing, Verdict, Watermark, code};

pub(super) struct Scripts {
    change: Script,
    changes: Script,
}

/// What the script of changes answers.
pub(super) type Answer = (String, u64, String, u64, u8);

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            change: Script::new(include_str!("change.lua")),
            changes: Script::new(include_str!("changes.lua")),
        }
    }

    pub(super) fn change(
        &self,
        [record, index]: [&Key; 2],
        request: &Request,
        node: NodeId,
        voter: NodeId,
        quorum: u32,
        channel: &str,
    ) -> Call {
        let mut pause = Duration::ZERO;
        let (op, wait, to) = match request.op {
            Op::Read => ("read", Duration::ZERO, ""),
            Op::Trip { wait, asked } => {
                pause = asked;
                ("trip", wait, "")
            }
            Op::Reopen { wait, asked } => {
                pause = asked;
                ("reopen", wait, "")
            }
            Op::Claim {
                lease,
                by_hand: false,
            } => ("claim", lease, ""),
            Op::Claim {
                lease,
                by_hand: true,
            } => ("seize", lease, ""),
            Op::Close => ("close", Duration::ZERO, ""),
            Op::Hand { to, wait } => ("hand", wait, code(to)),
            Op::Keep { to } => ("keep", Duration::ZERO, code(to)),
        };
        // Up, so that a wait is never cut; down, so that nothing is thought
        // to have happened before it has.
        let up = |span: Duration| {
            let millis = span.as_nanos().div_ceil(1_000_000);
            u64::try_from(millis).unwrap_or(u64::MAX).min(MOST)
        };
        let age = request.age.as_millis();
        self.change
            .on([record, index])
            .arg(op)
            .arg(request.base)
            .arg(node.to_string())
            .arg(u64::try_from(age).unwrap_or(u64::MAX).min(MOST))
            .arg(up(wait))
            .arg(quorum)
            .arg(channel)
            .arg(to)
            .arg(voter.to_string())
            .arg(up(pause))
    }

    pub(super) fn changes(&self, index: &Key, known: Watermark) -> Call {
        let (epoch, version) = known.since();
        self.changes.on([index]).arg(epoch).arg(version)
    }
}

/// The longest span in milliseconds: 367 days, above the longest of settings.
const MOST: u64 = 367 * 24 * 3600 * 1000;

/// `None` for what this script never says.
pub(super) fn read((verdict, version, state, left, ours): Answer) -> Option<Reply> {
    Some(Reply {
        verdict: Verdict::parse(&verdict)?,
        seen: Seen {
            version,
            standing: Standing::parse(&state, left, ours == 1)?,
        },
    })
}
