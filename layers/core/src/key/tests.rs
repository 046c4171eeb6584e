use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    net::{IpAddr, SocketAddr},
};

use http::{HeaderValue, Request};
use proptest::prelude::*;

use super::*;

mod client_ip;

fn get<E: ExtractKey>(extractor: &E, headers: &[(&'static str, &str)]) -> Option<Key> {
    extractor.extract(Head::from(&request(headers)))
}

fn request(headers: &[(&'static str, &str)]) -> Request<()> {
    let mut request = Request::new(());
    for (name, value) in headers {
        request
            .headers_mut()
            .append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    request
}

fn at(uri: &str) -> Request<()> {
    Request::builder().uri(uri).body(()).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

mod keys {
    use super::*;
    use crate::key::value::{KeyBuilder, Kind};

    #[test]
    fn a_key_is_small_and_bounded() {
        assert_eq!(size_of::<Key>(), 40);
        assert_eq!(size_of::<Option<Key>>(), 40);
        for len in [0, 1, 37, 38, 100, 1023, 1024, 100_000] {
            let key = Key::from("x".repeat(len));
            assert!(key.as_bytes().len() <= 1024, "{len}");
        }
        // 1 KiB with its tag is kept, one more is a digest.
        assert_eq!(Key::from("x".repeat(1023)).as_bytes().len(), 1024);
        assert_eq!(Key::from("x".repeat(1024)).as_bytes().len(), 33);
    }

    #[test]
    fn the_kind_is_part_of_the_key() {
        let long = "v".repeat(5000);
        for value in ["", "GET", "192.0.2.1", &long] {
            let bytes = value.as_bytes();
            let keys: HashSet<Key> = [
                Kind::Global,
                Kind::Address,
                Kind::Text,
                Kind::Number,
                Kind::Bytes,
                Kind::Header,
                Kind::Cookie,
                Kind::Path,
                Kind::Method,
                Kind::Host,
                Kind::Composite,
                Kind::Ambiguous,
            ]
            .map(|kind| Key::of(kind, bytes))
            .into();
            assert_eq!(keys.len(), 12, "{}", value.len());
        }
        // A value that is another's digest has another tag.
        let digest = Key::from_bytes(long.as_bytes());
        assert_ne!(Key::from_bytes(&digest.as_bytes()[1..]), digest);
    }

    #[test]
    fn equal_values_are_equal_keys() {
        assert_eq!(
            Key::from(ip("::ffff:192.0.2.1")),
            Key::from(ip("192.0.2.1"))
        );
        assert_eq!(Key::from(7_u64), Key::from(7_u32));
        assert_eq!(Key::from(7_u64), Key::from(&7_u128));
        assert_eq!(Key::from("a"), Key::from(String::from("a")));
        assert_ne!(Key::from(7_u64), Key::from("7"));
        assert_ne!(Key::from("a"), Key::from("a\0"));
        let hasher = RandomState::new();
        assert_eq!(
            hasher.hash_one(Key::from("a")),
            hasher.hash_one(Key::from("a").clone())
        );
        let table: HashMap<Key, u8> = [(Key::from("a"), 1), (Key::from("a".repeat(60)), 2)].into();
        assert_eq!(table[&Key::from("a".repeat(60))], 2);
    }

    #[test]
    fn a_key_does_not_tell_its_value() {
        let secret = "s3cret";
        for (key, kind) in [
            (Key::from(secret), "text"),
            (Key::from(secret.repeat(100)), "text"),
            (Key::from(secret.repeat(1000)), "text"),
            (Key::from_bytes(secret.as_bytes()), "bytes"),
            (header("x-key").key(secret), "header"),
            (cookie("sid").key(secret), "cookie"),
            (Key::from(ip("192.0.2.1")), "address"),
            (Key::from(42_u64), "number"),
            (Key::global(), "global"),
            (Key::ambiguous(), "ambiguous"),
            (
                Key::composite([Key::from(secret), Key::global()]),
                "composite",
            ),
        ] {
            assert_eq!(format!("{key:?}"), format!("Key({kind})"));
            assert_eq!(format!("{key:#?}"), format!("Key({kind})"));
        }
    }

    #[test]
    fn only_the_ambiguous_key_is_ambiguous() {
        assert!(Key::ambiguous().is_ambiguous());
        for other in [Key::global(), Key::from(""), header("x").key("\u{b}")] {
            assert!(!other.is_ambiguous());
        }
    }

    fn nasty_bytes() -> impl Strategy<Value = Vec<u8>> {
        // Short ones of few letters, the tag of bytes among them, so that
        // equal concatenations are found, and ones around the limits.
        prop_oneof![
            8 => proptest::collection::vec(2_u8..6, 0..6),
            1 => proptest::collection::vec(any::<u8>(), 30..45),
            1 => proptest::collection::vec(any::<u8>(), 120..136),
            1 => proptest::collection::vec(any::<u8>(), 1000..1050),
        ]
    }

    #[test]
    fn parts_cannot_imitate_the_border_between_them() {
        let tag = Key::from_bytes(b"").as_bytes()[0];
        let pair = |a: &[u8], b: &[u8]| Key::composite([Key::from_bytes(a), Key::from_bytes(b)]);
        assert_ne!(pair(&[7, tag, 8], &[9]), pair(&[7], &[8, tag, 9]));
        for length in 0..=255 {
            let border = [length, tag, 8];
            assert_ne!(
                pair(&[&[7], &border[..]].concat(), &[9]),
                pair(&[7], &[8, length, tag, 9]),
                "{length}"
            );
        }
        // Lengths of one and of two bytes.
        for length in [126, 127, 128, 129, 255, 256] {
            assert_ne!(
                pair(&vec![1; length], &[1]),
                pair(&vec![1; length - 1], &[1, 1]),
                "{length}"
            );
        }
    }

    proptest! {
        #[test]
        fn pieces_make_the_same_key_as_the_whole(pieces in proptest::collection::vec(nasty_bytes(), 0..5)) {
            let mut builder = KeyBuilder::new(Kind::Bytes);
            for piece in &pieces {
                builder.push(piece);
            }
            let key = builder.finish();
            let whole = pieces.concat();
            prop_assert_eq!(&key, &Key::from_bytes(&whole));
            prop_assert!(key.as_bytes().len() <= 1024);
            if whole.len() < 1024 {
                prop_assert_eq!(&key.as_bytes()[1..], &whole[..]);
            }
        }

        #[test]
        fn composites_are_equal_only_where_all_parts_are(
            [a, b, c, d] in [nasty_bytes(), nasty_bytes(), nasty_bytes(), nasty_bytes()],
        ) {
            let key = Key::from_bytes;
            let pair = |x: &[u8], y: &[u8]| Key::composite([key(x), key(y)]);
            prop_assert_eq!(pair(&a, &b) == pair(&c, &d), a == c && b == d);
            prop_assert_eq!(pair(&a, &b) == pair(&b, &a), a == b);

            // The same bytes, cut elsewhere.
            let joined = [&a[..], &b[..]].concat();
            for cut in (0..=joined.len().min(8)).filter(|cut| *cut != a.len()) {
                prop_assert_ne!(pair(&joined[..cut], &joined[cut..]), pair(&a, &b));
            }
            // Fewer, more or nested parts.
            let three = Key::composite([key(&a), key(&b), key(&c)]);
            let left = Key::composite([pair(&a, &b), key(&c)]);
            let right = Key::composite([key(&a), pair(&b, &c)]);
            prop_assert_ne!(&three, &left);
            prop_assert_ne!(&three, &right);
            prop_assert_ne!(&left, &right);
            prop_assert_ne!(&three, &pair(&a, &b));
            prop_assert_ne!(&pair(&a, &b), &key(pair(&a, &b).as_bytes()));
        }
    }
}

mod headers {
    use super::*;

    #[test]
    fn a_missing_or_empty_header_is_no_key() {
        let by = header("x-api-key");
        assert_eq!(get(&by, &[]), None);
        assert_eq!(get(&by, &[("x-api-key", "")]), None);
        assert_eq!(get(&by, &[("x-api-key", " \t")]), None);
        assert_eq!(get(&by, &[("x-other", "a")]), None);
    }

    #[test]
    fn repeating_a_header_gains_nothing() {
        let by = header("x-api-key");
        let one = get(&by, &[("x-api-key", "a")]);
        assert_eq!(one, Some(by.key("a")));
        assert_eq!(get(&by, &[("x-api-key", "a"), ("x-api-key", " a ")]), one);
        for fresh in ["b", "c", ""] {
            for pair in [["a", fresh], [fresh, "a"]] {
                let lines = pair.map(|value| ("x-api-key", value));
                assert_eq!(get(&by, &lines), Some(Key::ambiguous()), "{pair:?}");
            }
        }
    }

    #[test]
    fn the_scheme_of_authorization_has_no_spellings() {
        let by = header(http::header::AUTHORIZATION);
        let plain = get(&by, &[("authorization", "Bearer AbC")]);
        assert!(plain.is_some());
        for spelling in ["bearer AbC", "BEARER   AbC", " bEaReR\tAbC "] {
            assert_eq!(get(&by, &[("authorization", spelling)]), plain);
        }
        assert_ne!(get(&by, &[("authorization", "Bearer abc")]), plain);
        assert_ne!(get(&by, &[("authorization", "Basic AbC")]), plain);
        assert_ne!(get(&by, &[("authorization", "BearerAbC")]), plain);
        // Another header's value is nobody's scheme.
        let other = header("x-api-key");
        assert_ne!(other.key("Bearer AbC"), other.key("bearer AbC"));
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let error = Header::new("x api key").unwrap_err().to_string();
        assert!(error.contains("expected a field name"), "{error}");
        assert!(Header::new(String::new()).is_err());
        assert!(Header::new(String::from("X-Key")).is_ok());
        let error = Cookie::new("a=b").unwrap_err().to_string();
        assert!(error.contains("\"a=b\""), "{error}");
        assert!(Cookie::new("").is_err());
    }

    #[test]
    #[should_panic(expected = "expected a field name")]
    fn nonsense_in_the_source_panics() {
        let _ = header("x api key");
    }
}

mod cookies {
    use super::*;

    fn sid(lines: &[&str]) -> Option<Key> {
        let lines: Vec<_> = lines.iter().map(|line| ("cookie", *line)).collect();
        get(&cookie("sid"), &lines)
    }

    #[test]
    fn a_cookie_is_found_on_every_line() {
        let one = Some(cookie("sid").key("s1"));
        assert_eq!(sid(&["sid=s1"]), one);
        assert_eq!(sid(&["a=b; sid=s1; c=d"]), one);
        assert_eq!(sid(&["a=b;sid=s1;"]), one);
        assert_eq!(sid(&["a=b", "c=d; sid = s1 "]), one);
        assert_eq!(sid(&["junk; =; ;; sid=s1"]), one);
        assert_eq!(sid(&["sid=s1; sid=s1", "sid=s1"]), one);
        assert_eq!(sid(&["sid=a=b=="]), Some(cookie("sid").key("a=b==")));
    }

    #[test]
    fn a_missing_or_empty_cookie_is_no_key() {
        for lines in [
            &["SID=s1"][..],
            &["xsid=s1; sidx=s2"],
            &["sid"],
            &["sid="],
            &["sid=\"\""],
            &["a=sid; b=\"sid=s1\""],
            &[],
        ] {
            assert_eq!(sid(lines), None, "{lines:?}");
        }
    }

    #[test]
    fn repeating_a_cookie_gains_nothing() {
        assert_eq!(sid(&["sid=s1; sid=x"]), Some(Key::ambiguous()));
        assert_eq!(sid(&["sid=x", "sid=s1"]), Some(Key::ambiguous()));
        assert_eq!(sid(&["sid=; sid=s1"]), Some(Key::ambiguous()));
    }

    #[test]
    fn spelling_a_cookie_otherwise_gains_nothing() {
        let one = sid(&["sid=abc\"%"]);
        assert!(one.is_some());
        for spelling in [
            r#"sid="abc\"%""#,
            "sid=%61bc\"%",
            "sid=%61%62%63%22%25",
            r#"sid="\141bc\042%""#,
            r#"sid="\a\b\c%22%""#,
        ] {
            assert_eq!(sid(&[spelling]), one, "{spelling}");
        }
        assert_ne!(sid(&["sid=ABC\"%"]), one);
        // What begins no escape stays.
        assert_ne!(sid(&["sid=%zz"]), sid(&["sid=zz"]));
        assert_ne!(sid(&["sid=a%4"]), sid(&["sid=a"]));
        assert_ne!(sid(&[r#"sid="a\""#]), sid(&["sid=a"]));
    }
}

mod places {
    use super::*;

    #[test]
    fn the_path_is_without_query_and_encoding() {
        let key = |uri| path().extract(Head::from(&at(uri))).unwrap();
        assert_eq!(key("/a/b"), key("/a/b?q=1"));
        assert_eq!(key("/a/b"), key("/%61/%62"));
        assert_eq!(key("/%C3%A9"), key("/%c3%a9"));
        assert_eq!(key("http://example.org"), key("/"));
        assert_ne!(key("/a/b"), key("/a/b/"));
        assert_ne!(key("/a"), key("/A"));
    }

    #[test]
    fn the_host_has_one_spelling() {
        let one = host().extract(Head::from(&at("http://example.org/")));
        assert!(one.is_some());
        assert_eq!(
            host().extract(Head::from(&at("http://user@EXAMPLE.org.:80/"))),
            one
        );
        for spelling in [
            "example.org",
            "eXample.ORG:8080",
            "example.org.",
            " example.org ",
        ] {
            assert_eq!(get(&host(), &[("host", spelling)]), one, "{spelling}");
        }
        assert_eq!(
            get(&host(), &[("host", "[2001:DB8::1]:80")]),
            get(&host(), &[("host", "[2001:db8::1]")]),
        );
        assert_ne!(get(&host(), &[("host", "example.com")]), one);
        assert_eq!(get(&host(), &[("host", "")]), None);
        assert_eq!(get(&host(), &[]), None);
        assert_eq!(
            get(&host(), &[("host", "a"), ("host", "b")]),
            Some(Key::ambiguous())
        );
    }

    #[test]
    fn the_method_is_as_sent() {
        let key = |name: &str| {
            let request = Request::builder().method(name).body(()).unwrap();
            method().extract(Head::from(&request))
        };
        assert_eq!(key("GET"), key("GET"));
        assert_ne!(key("GET"), key("POST"));
        assert_ne!(key("PURGE"), key("purge"));
    }

    #[test]
    fn extensions_are_read_in_place() {
        let mut request = Request::new(());
        let by = extension::<String>();
        assert_eq!(by.extract(Head::from(&request)), None);
        request.extensions_mut().insert(String::from("alice"));
        assert_eq!(by.extract(Head::from(&request)), Some(Key::from("alice")));
        let by_length = extension_with(|name: &String| Key::from(name.len() as u64));
        assert_eq!(
            by_length.extract(Head::from(&request)),
            Some(Key::from(5_u64))
        );
        let none = extension_with(|_: &String| None::<Key>);
        assert_eq!(none.extract(Head::from(&request)), None);
    }
}

mod combined {
    use super::*;

    #[test]
    fn a_tuple_needs_all_its_parts() {
        let by = (header("a"), header("b"), method(), Global);
        let full = get(&by, &[("a", "1"), ("b", "2")]);
        assert!(full.is_some());
        assert_eq!(get(&by, &[("a", "1")]), None);
        assert_eq!(get(&by, &[("b", "2")]), None);
        assert_ne!(get(&by, &[("a", "2"), ("b", "1")]), full);
        let three = (header("a"), header("b"), method());
        assert_ne!(get(&three, &[("a", "1"), ("b", "2")]), full);
    }

    #[test]
    fn or_takes_the_place_of_none_and_of_many() {
        let by = header("a").or(header("b"));
        let key = |value| Some(header("a").key(value));
        assert_eq!(get(&by, &[("a", "1"), ("b", "2")]), key("1"));
        assert_eq!(get(&by, &[("b", "2")]), key("2"));
        assert_eq!(get(&by, &[("a", "1"), ("a", "x"), ("b", "2")]), key("2"));
        assert_eq!(get(&by, &[("a", "1"), ("a", "x")]), Some(Key::ambiguous()));
        assert_eq!(get(&by, &[]), None);

        let told_apart = header("a").or((Key::from("guest"), header("b")));
        assert_ne!(
            get(&told_apart, &[("a", "1")]),
            get(&told_apart, &[("b", "1")])
        );
    }

    #[test]
    fn or_chains_and_shares() {
        let by = header("a").or(cookie("b")).or(Global).shared();
        let again = by.clone();
        assert_eq!(get(&again, &[]), Some(Key::global()));
        assert_eq!(get(&by, &[("cookie", "b=1")]), Some(cookie("b").key("1")));
        assert_eq!(format!("{by:?}"), "SharedKey");
    }

    #[test]
    fn closures_extract_on_http_and_elsewhere() {
        let by = from_fn(|head| head.uri.query().map(Key::from)).or(Global);
        assert_eq!(by.extract(Head::from(&at("/?q"))), Some(Key::from("q")));
        assert_eq!(by.extract(Head::from(&at("/"))), Some(Key::global()));

        let bare = |head: Head<'_>| Some(Key::from(head.uri.path()));
        let pair = (bare, ClientIp::new());
        let mut request = at("/a");
        assert_eq!(pair.extract(Head::from(&request)), None);
        request
            .extensions_mut()
            .insert(PeerAddr(SocketAddr::from(([192, 0, 2, 1], 1))));
        assert!(pair.extract(Head::from(&request)).is_some());

        let elsewhere: SharedKey<Any<u64>> =
            (from_request(|number: &u64| Key::from(number % 2)), Global).shared();
        assert_eq!(elsewhere.extract(&2), elsewhere.extract(&4));
        assert_ne!(elsewhere.extract(&2), elsewhere.extract(&3));
    }
}
