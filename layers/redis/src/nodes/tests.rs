use super::*;

fn slots(ranges: &[(i64, i64, &str)]) -> Value {
    let range = |&(first, last, host): &(i64, i64, &str)| {
        let node = vec![
            Value::BulkString(host.into()),
            Value::Int(6379),
            Value::BulkString(b"id".to_vec()),
        ];
        Value::Array(vec![
            Value::Int(first),
            Value::Int(last),
            Value::Array(node),
        ])
    };
    Value::Array(ranges.iter().map(range).collect())
}

fn get(key: &str) -> Cmd {
    let mut cmd = Cmd::new();
    cmd.arg("GET").arg(key);
    cmd
}

/// `foo` is in slot 12182, `bar` in 5061.
fn gate(gates: &Gates, key: &str) -> *const Gate {
    gates.of(&get(key))
}

#[test]
fn a_node_takes_only_its_slots_with_it() {
    let gates = Gates::cluster();
    assert!(gates.any_open());
    assert_eq!(
        gate(&gates, "foo"),
        gate(&gates, "bar"),
        "nothing is known yet"
    );
    assert!(gates.learn(&slots(&[(0, 9999, "a"), (10_000, 16_383, "b")])));
    assert_ne!(gate(&gates, "foo"), gate(&gates, "bar"));
    gates.of(&get("foo")).shut();
    assert!(gates.of(&get("bar")).is_open());
    assert!(gates.any_open());
    gates.of(&get("bar")).shut();
    assert!(!gates.any_open());
    assert!(gates.open());
    assert_eq!(gates.used().count(), 2);
}

#[test]
fn a_slot_that_moves_leaves_the_gate_behind() {
    let gates = Gates::cluster();
    gates.learn(&slots(&[(0, 9999, "a"), (10_000, 16_383, "b")]));
    let before = gate(&gates, "bar");
    gates.of(&get("foo")).shut();
    gates.learn(&slots(&[(0, 9999, "a"), (10_000, 16_383, "c")]));
    assert!(gates.of(&get("foo")).is_open(), "its replica was promoted");
    assert_eq!(
        gate(&gates, "bar"),
        before,
        "nothing has changed for the other"
    );
    assert_eq!(gates.used().count(), 2);
}

#[test]
fn nonsense_changes_nothing() {
    let gates = Gates::cluster();
    gates.learn(&slots(&[(0, 9999, "a"), (10_000, 16_383, "b")]));
    let before = gate(&gates, "foo");
    for nonsense in [
        Value::Nil,
        Value::Array(vec![]),
        Value::Array(vec![Value::Int(1)]),
        slots(&[(5, 2, "a")]),
        slots(&[(0, 16_384, "a")]),
        slots(&[(-1, 3, "a")]),
    ] {
        assert!(!gates.learn(&nonsense));
    }
    assert_eq!(gate(&gates, "foo"), before);
    assert!(!Gates::single().learn(&slots(&[(0, 16_383, "a")])));
}

#[test]
fn more_nodes_than_gates_share_the_last() {
    let hosts: Vec<String> = (0..200).map(|n| format!("node-{n}")).collect();
    let ranges: Vec<_> = (0..)
        .zip(&hosts)
        .map(|(n, host)| (n * 80, n * 80 + 79, host.as_str()))
        .collect();
    let gates = Gates::cluster();
    for _ in 0..3 {
        assert!(gates.learn(&slots(&ranges)));
        assert_eq!(gates.used().count(), MOST);
    }
    gates.shut();
    assert!(!gates.any_open());
}

#[test]
fn the_key_is_where_the_command_has_it() {
    let script = |name: &str, keys: &str, key: &str| {
        let mut cmd = Cmd::new();
        cmd.arg(name).arg("text").arg(keys).arg(key);
        cmd
    };
    assert_eq!(key(&get("foo")), Some(&b"foo"[..]));
    assert_eq!(key(&script("EVALSHA", "1", "foo")), Some(&b"foo"[..]));
    assert_eq!(key(&script("eval", "1", "foo")), Some(&b"foo"[..]));
    let mut ping = Cmd::new();
    ping.arg("PING");
    assert_eq!(key(&ping), None);
}

#[test]
fn each_gate_has_a_key_to_probe_it_with() {
    let gates = Gates::cluster();
    gates.learn(&slots(&[
        (0, 9999, "a"),
        (10_000, 16_382, "b"),
        (16_383, 16_383, "c"),
    ]));
    for (index, gate) in gates.used() {
        let key = gates.key_behind(index, "buttress:probe").unwrap();
        assert!(std::ptr::eq(gates.of(&get(&key)), gate));
    }
    assert_eq!(gates.key_behind(40, "buttress:probe"), None);
    assert_eq!(Gates::single().key_behind(0, "p").as_deref(), Some("p"));
}

fn cmd(words: &[&str]) -> Cmd {
    let mut cmd = Cmd::new();
    for word in words {
        cmd.arg(word);
    }
    cmd
}

/// The question whose slots are whose was taken for one of the key `SLOTS`, and
/// went on to be asked of a node that was gone and had that key's slot.
#[test]
fn only_what_goes_to_the_one_lost_node_is_spared_the_client() {
    let gates = Gates::cluster();
    gates.learn(&slots(&[(0, 16_383, "a")]));
    let others = [
        cmd(&["CLUSTER", "SLOTS"]),
        cmd(&["PING"]),
        cmd(&["DBSIZE"]),
        cmd(&["SCRIPT", "FLUSH"]),
        cmd(&["MGET", "foo", "bar"]),
    ];
    for other in &others {
        gates.lose(other);
    }
    assert!(!gates.any_lost());
    gates.lose(&get("foo"));
    assert!(gates.any_lost());
    assert_eq!(gates.lost(&get("foo")).as_deref(), Some("a:6379"));
    let script = cmd(&["EVALSHA", "text", "1", "foo", "x"]);
    assert_eq!(gates.lost(&script).as_deref(), Some("a:6379"));
    for other in &others {
        assert_eq!(gates.lost(other), None);
    }
    gates.all_found();
    assert_eq!(gates.lost(&get("foo")), None);
}

/// A node that does not know its own address is at the one that was asked,
/// which only the client knows.
#[test]
fn a_node_without_a_name_is_left_to_the_client() {
    for host in ["", "?", "0.0.0.0", "::"] {
        let gates = Gates::cluster();
        gates.learn(&slots(&[(0, 9999, host), (10_000, 16_383, "b")]));
        assert_ne!(gate(&gates, "foo"), gate(&gates, "bar"));
        gates.lose(&get("bar"));
        assert_eq!(gates.lost(&get("bar")), None, "{host:?}");
        gates.lose(&get("foo"));
        assert_eq!(gates.lost(&get("foo")).as_deref(), Some("b:6379"));
    }
}
