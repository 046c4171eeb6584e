use std::collections::HashMap;

use proptest::{collection::vec, prelude::*};

use super::*;

/// A key's whole input: prefix, namespace, segments in the tag and behind it.
type Input = (usize, usize, Vec<Vec<u8>>, Vec<Vec<u8>>);

/// Neither prefix is the beginning of the other, as the documentation asks.
const PREFIXES: [&str; 2] = ["buttress:", "shop:"];
const NAMESPACES: [&str; 4] = ["a", "a-b", "rate-limit", "lock"];

fn key((prefix, namespace, tag, behind): &Input) -> Key {
    let space = Keyspace::new(PREFIXES[*prefix], NAMESPACES[*namespace]);
    behind.iter().fold(space.tag(tag), Key::segment)
}

/// What is likeliest to be mistaken for something else: marks of our own,
/// what they encode to, bytes that are no text, and lengths around the limit.
fn segment() -> impl Strategy<Value = Vec<u8>> {
    let marks = proptest::sample::select(&b"%:{}~ab2A5.-_\0\xff"[..]);
    prop_oneof![
        6 => vec(marks, 0..4),
        2 => vec(any::<u8>(), 0..80),
        1 => (60..70_usize).prop_map(|length| vec![b'x'; length]),
        1 => (18..24_usize).prop_map(|length| vec![b':'; length]),
        1 => Just(hash_text(&[b'x'; 65])),
    ]
}

/// What a hashed segment looks like, as input.
fn hash_text(segment: &[u8]) -> Vec<u8> {
    let mut text = String::new();
    encode(segment, &mut text);
    text.into_bytes()
}

fn input() -> impl Strategy<Value = Input> {
    let place = (0..PREFIXES.len(), 0..NAMESPACES.len());
    let segments = (vec(segment(), 0..4), vec(segment(), 0..3));
    (place, segments)
        .prop_map(|((prefix, namespace), (tag, behind))| (prefix, namespace, tag, behind))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_family_has_the_keys_that_its_segments_have(
        mut tag in vec(segment(), 0..3),
        last in segment(),
        behind in segment(),
    ) {
        let space = Keyspace::new(PREFIXES[0], NAMESPACES[0]);
        let family = space.family(&tag, &behind);
        let key = family.key(&last);
        tag.push(last);
        prop_assert_eq!(key, space.tag(tag).segment(behind));
    }

    #[test]
    fn no_two_inputs_give_one_key(inputs in vec(input(), 2..40)) {
        let mut seen: HashMap<String, Input> = HashMap::new();
        for input in inputs {
            let key = key(&input).as_str().to_owned();
            if let Some(other) = seen.insert(key, input.clone()) {
                prop_assert_eq!(other, input);
            }
        }
    }

    #[test]
    fn each_has_its_prefix_and_one_hash_tag(input in input()) {
        let key = key(&input);
        let text = key.as_str();
        let start = format!("{}{}:{{", PREFIXES[input.0], NAMESPACES[input.1]);
        prop_assert!(text.starts_with(&start));
        prop_assert_eq!(text.matches('{').count(), 1);
        prop_assert_eq!(text.matches('}').count(), 1);
        prop_assert!(!text.contains("{}"), "an empty tag is none");
        prop_assert!(text.bytes().all(|byte| byte.is_ascii_graphic()));
        // The tag alone decides where it is.
        let space = Keyspace::new(PREFIXES[input.0], NAMESPACES[input.1]);
        prop_assert_eq!(key.slot(), space.tag(&input.2).slot());
        let tag = &text[text.find('{').unwrap() + 1..text.find('}').unwrap()];
        prop_assert_eq!(key.slot(), Slot::of(tag.as_bytes()));
        // Of bounded length, whatever a client says.
        prop_assert!(text.len() <= start.len() + 66 * (input.2.len().max(1) + input.3.len()));
    }

    #[test]
    fn channels_are_no_keys_and_differ(a in segment(), b in segment()) {
        let space = Keyspace::new("buttress:", "a");
        prop_assert_eq!(space.channel(&a) == space.channel(&b), a == b);
        prop_assert!(!space.channel(&a).contains('{'), "no tag");
    }
}

#[test]
fn they_read_well() {
    let space = Keyspace::new("buttress:", "rate-limit");
    let key = space.tag(["orders", "10.0.0.7"]).segment("per-second");
    assert_eq!(
        key.as_str(),
        "buttress:rate-limit:{orders:10.0.0.7}:per-second"
    );
    assert_eq!(
        space.tag(["2001:db8::1"]).as_str(),
        "buttress:rate-limit:{2001%3Adb8%3A%3A1}"
    );
    assert_eq!(space.tag([""]).as_str(), "buttress:rate-limit:{%}");
    assert_eq!(space.tag([""; 0]).as_str(), "buttress:rate-limit:{%%}");
    assert_eq!(space.tag([b"\xff"]).as_str(), "buttress:rate-limit:{%FF}");
    assert_eq!(space.tag(["x".repeat(64)]).as_str().len(), 22 + 64);
    assert_eq!(space.tag(["x".repeat(65)]).as_str().len(), 22 + 65);
    assert_eq!(
        format!("{key:?}"),
        "Key(..)",
        "a client's name is nobody's business"
    );
}

#[test]
fn slots_are_those_of_the_specification() {
    // From the specification, and by `CLUSTER KEYSLOT`.
    for (key, slot) in [
        ("123456789", 0x31C3),
        ("foo", 12_182),
        ("{foo}bar", 12_182),
        ("foo{}{bar}", 8_363),
        ("{user1000}.following", 3_443),
        ("", 0),
    ] {
        assert_eq!(Slot::of(key.as_bytes()).number(), slot, "{key}");
    }
}
