//! The script, and what goes in and comes out.

use buttress_redis::{Call, Key, Script, Value};

use super::share::{Grant, Want};
use crate::{Gcra, gcra::Span};

const TEXT: &str = concat!(
    "local time = redis.call('TIME')\n",
    "local now = time[1] * 1000000 + time[2]\n",
    include_str!("../common.lua"),
    include_str!("../lease.lua")
);

pub(super) fn script() -> Script {
    Script::new(TEXT)
}

/// Asks for `wants` of these keys, which are of one slot.
pub(super) fn call(script: &Script, wants: &[(Key, Gcra, Want)]) -> Call {
    let keys: Vec<&Key> = wants.iter().map(|(key, ..)| key).collect();
    let mut call = script.on(keys);
    for (_, gcra, want) in wants {
        let (charge, tolerance) = (gcra.charge(1), gcra.most());
        call.push(charge.micros);
        call.push(charge.rest);
        call.push(gcra.parts());
        call.push(tolerance.micros);
        call.push(tolerance.rest);
        call.push(want.least);
        call.push(want.need);
        call.push(want.more);
    }
    call
}

/// What the server says, on a clock on which it was asked at `sent`. `None`
/// where that makes no sense.
pub(super) fn answer(value: &Value, wants: &[(Key, Gcra, Want)], sent: u64) -> Option<Vec<Grant>> {
    let Value::Array(values) = value else {
        return None;
    };
    if values.len() != 3 * wants.len() {
        return None;
    }
    let int = |value: &Value| match value {
        Value::Int(int) => u64::try_from(*int).ok(),
        _ => None,
    };
    values
        .chunks_exact(3)
        .zip(wants)
        .map(|(values, (_, gcra, want))| {
            let granted = u32::try_from(int(&values[0])?).ok()?;
            let (micros, rest) = (int(&values[1])?, int(&values[2])?);
            // More than was asked for nobody has charged for us.
            (granted <= want.need.saturating_add(want.more)).then(|| Grant {
                granted,
                tat: gcra.ahead(sent, Span { micros, rest }),
            })
        })
        .collect()
}
