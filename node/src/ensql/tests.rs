use proptest::prelude::*;

use super::*;

fn error(query: &str) -> String {
    parse(query).unwrap_err().to_string()
}

#[test]
fn a_whole_topic_is_asked_for() {
    let query = parse("SELECT * FROM listens").unwrap();
    assert_eq!(query, Query { from: "listens".to_owned(), ..Query::default() });
    assert_eq!(query.unsupported(), None);
}

#[test]
fn offset_and_limit_come_in_either_order_and_case() {
    for text in [
        "select * from topic offset 3 limit 5",
        " SELECT * FROM topic LIMIT 5 OFFSET 3 ;; ",
        "SELECT*FROM topic LIMIT 5 OFFSET 3;",
    ] {
        let query = parse(text).unwrap();
        assert_eq!((query.offset, query.limit), (3, Some(5)), "{text}");
    }
    assert_eq!(parse("SELECT * FROM topic LIMIT 0").unwrap().limit, Some(0));
}

#[test]
fn names_with_dots_and_names_that_begin_like_keywords_are_topics() {
    for name in ["testing.testapp.alerts", "orders", "as-built", "limit_orders.v2", "topic.schema.42.12", "a.b-c.d_e"] {
        assert_eq!(parse(&format!("SELECT * FROM {name} LIMIT 1")).unwrap().from, name);
    }
    let query = parse("SELECT * FROM a.b.c").unwrap();
    assert_eq!(query.topic_prefixes().collect::<Vec<_>>(), ["a.b", "a"]);
}

#[test]
fn valid_clauses_that_are_not_run_are_named() {
    let text =
        "SELECT a, b AS c FROM my-topic_1.Schema.3 WHERE (x = 'y' OR x ILIKE '%z') AND n >= -1.5 OFFSET 2 LIMIT 9;";
    let query = parse(text).unwrap();
    assert_eq!(query.from, "my-topic_1.Schema.3");
    assert_eq!(query.fields[1], Field { name: "b".to_owned(), alias: Some("c".to_owned()) });
    assert!(query.unsupported().unwrap().starts_with("selecting fields is not supported"));
    let filtered = parse("SELECT * FROM topic WHERE color = 'it\\'s red'").unwrap();
    assert!(filtered.unsupported().unwrap().starts_with("WHERE is not supported"));
}

#[test]
fn syntax_errors_read_as_documented() {
    let cases = [
        ("SELECT", "topic name cannot be empty"),
        ("   ", "empty query is invalid"),
        ("WHERE", r#"syntax error at position 0 near "WHERE": invalid query type"#),
        ("INSERT INTO topic", r#"syntax error at position 0 near "INSERT": invalid query type"#),
        ("SELECT FROM topic", "SELECT requires field projection or *"),
        ("SELECT *, name FROM topic", "cannot select * and specify fields"),
        ("SELECT 'name' FROM topic", r#"syntax error at position 7 near "name": invalid field identifier"#),
        ("SELECT name age FROM topic", r#"syntax error at position 12 near "age": invalid select fields statement"#),
        ("SELECT COUNT(*) FROM topic", r#"syntax error at position 12 near "(": invalid select fields statement"#),
        ("SELECT * AS foo FROM topic", r#"syntax error at position 12 near "foo": cannot alias *"#),
        ("SELECT name AS 1234 FROM topic", r#"syntax error at position 15 near "1234": invalid alias identifier"#),
        (
            "SELECT * FROM 01GTSMQ3V8ASAPNCFEN378T8RD",
            r#"syntax error at position 14 near "01": invalid topic identifier"#,
        ),
        ("SELECT * FROM topic SELECT", r#"syntax error at position 20 near "SELECT": invalid from clause"#),
        ("SELECT * FROM a, b", r#"syntax error at position 15 near ",": invalid from clause"#),
        ("SELECT * FROM topic OFFSET abcd", r#"syntax error at position 27 near "abcd": invalid offset"#),
        ("SELECT * FROM topic OFFSET '32'", r#"syntax error at position 27 near "32": invalid offset"#),
        ("SELECT * FROM topic OFFSET -42", r#"syntax error at position 27 near "-42": could not parse offset"#),
        ("SELECT * FROM topic LIMIT 7.77", r#"syntax error at position 26 near "7.77": could not parse limit"#),
        (
            "SELECT * FROM topic LIMIT 1 WHERE a = 1",
            r#"syntax error at position 28 near "WHERE": invalid limit clause"#,
        ),
        (
            "SELECT * FROM topic OFFSET 5 LIMIT 3 OFFSET 6",
            r#"syntax error at position 44 near "6": offset has already been set"#,
        ),
        (
            "SELECT * FROM topic LIMIT 5 OFFSET 3 LIMIT 6",
            r#"syntax error at position 43 near "6": limit has already been set"#,
        ),
        (
            "SELECT * FROM TOPIC 'unclosed",
            r#"syntax error at position 20 near "'uncl": quoted string missing closing quote"#,
        ),
        ("SELECT * FROM topic WHERE 42", r#"syntax error at position 26 near "42": invalid where clause"#),
        ("SELECT * FROM topic WHERE color = red", r#"syntax error at position 34 near "red": invalid where clause"#),
        ("SELECT * FROM topic WHERE color 'red'", r#"syntax error at position 32 near "red": invalid where clause"#),
        (
            "SELECT * FROM topic WHERE color = 'red' AND OR",
            r#"syntax error at position 44 near "OR": invalid where clause"#,
        ),
        (
            "SELECT * FROM topic WHERE a > 1e5",
            r#"syntax error at position 31 near "e5": cannot append or update condition in group"#,
        ),
        (
            "SELECT * FROM topic WHERE a = 1)",
            r#"syntax error at position 31 near ")": cannot close expression parentheses"#,
        ),
        (
            "SELECT * FROM topic; foo",
            r#"syntax error at position 21 near "foo": nothing may follow the end of the query"#,
        ),
        ("SELECT * FROM topic @", r#"syntax error at position 20 near "@": invalid from clause"#),
        ("SELECT * FROM \"topic\"", "syntax error at position 14 near \"\\\"\": invalid topic identifier"),
    ];
    for (query, expected) in cases {
        assert_eq!(error(query), expected, "{query}");
    }
}

#[test]
fn deep_nesting_is_refused_not_followed() {
    let query = format!("SELECT * FROM topic WHERE {}a = 1", "(".repeat(100_000));
    assert!(error(&query).ends_with("too many nested parentheses"));
}

proptest! {
    #[test]
    fn no_text_panics_the_parser(text in ".{0,80}") {
        let _ = parse(&text);
        let _ = parse(&format!("SELECT * FROM {text}"));
        let _ = parse(&format!("SELECT * FROM t1 WHERE {text}"));
    }
}
