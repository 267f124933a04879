//! Canonical JSON: one value, one spelling, so that its digest can be a name.
//!
//! In: anything that serialises. Out: UTF-8 without white space or line end, in which
//!
//! - the members of an object stand in the order of their names' bytes, each name once;
//! - strings are escaped where JSON demands it and nowhere else: `\"`, `\\`, `\b`, `\t`, `\n`, `\f`, `\r`, and `\u00xx` in lower case for
//!   other control characters;
//! - numbers are integers from -2^63 to 2^64-1, in decimal, without sign or zeros in front.
//!
//! This is RFC 8785 but for numbers: there they are binary64, and 2^53+1 loses its end; here a fraction is refused, because a name must not hang
//! on how somebody rounds. (A `NaN` or an infinity is `null` to serde_json before it comes here.)

use serde::Serialize;
use serde_json::Value;

/// Why a value has no canonical form.
#[derive(Debug, thiserror::Error)]
pub enum CanonicalError {
    /// It is no JSON: a map whose keys are no strings, say.
    #[error("What a template is made of can't be written as JSON.")]
    NoJson(#[source] serde_json::Error),
    /// A number that is no integer.
    #[error(
        "What a template is made of has the number {0}, which is no integer: give it in a smaller unit, or as a string."
    )]
    Fraction(serde_json::Number),
}

/// The canonical form.
pub(super) fn canonical(value: &impl Serialize) -> Result<Vec<u8>, CanonicalError> {
    let value = serde_json::to_value(value).map_err(CanonicalError::NoJson)?;
    let mut text = Vec::new();
    write(&value, &mut text)?;
    Ok(text)
}

/// As deep as what it was made from: the host's own types, never a stranger's words.
fn write(value: &Value, out: &mut Vec<u8>) -> Result<(), CanonicalError> {
    match value {
        Value::Null => out.extend(b"null"),
        Value::Bool(truth) => out.extend(if *truth { &b"true"[..] } else { b"false" }),
        Value::Number(number) if number.is_i64() || number.is_u64() => {
            out.extend(number.to_string().as_bytes());
        }
        Value::Number(number) => return Err(CanonicalError::Fraction(number.clone())),
        Value::String(text) => string(text, out)?,
        Value::Array(elements) => {
            out.push(b'[');
            for (at, element) in elements.iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                write(element, out)?;
            }
            out.push(b']');
        }
        Value::Object(members) => {
            // Sorted here: whether serde_json keeps them sorted is for other crates' features to decide.
            let mut members: Vec<(&String, &Value)> = members.iter().collect();
            members.sort_unstable_by_key(|(name, _)| name.as_bytes());
            out.push(b'{');
            for (at, (name, member)) in members.into_iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                string(name, out)?;
                out.push(b':');
                write(member, out)?;
            }
            out.push(b'}');
        }
    }
    Ok(())
}

/// serde_json escapes exactly what the form above says, which the tests pin.
fn string(text: &str, out: &mut Vec<u8>) -> Result<(), CanonicalError> {
    serde_json::to_writer(out, text).map_err(CanonicalError::NoJson)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn text(value: &Value) -> String {
        String::from_utf8(canonical(value).unwrap()).unwrap()
    }

    #[test]
    fn the_form_is_pinned() {
        let value = json!({
            "b": [true, false, null, -1, 0, u64::MAX, i64::MIN],
            "a": { "é": "ü/\u{7f}\u{2028}", "z": "\"\\\u{8}\t\n\u{c}\r\u{0}\u{1f}", "": {} },
            "\u{10000}": 1, "\u{ffff}": 2,
        });
        assert_eq!(
            text(&value),
            "{\"a\":{\"\":{},\"z\":\"\\\"\\\\\\b\\t\\n\\f\\r\\u0000\\u001f\",\"é\":\"ü/\u{7f}\u{2028}\"},\
             \"b\":[true,false,null,-1,0,18446744073709551615,-9223372036854775808],\
             \"\u{ffff}\":2,\"\u{10000}\":1}"
        );
    }

    #[test]
    fn fractions_and_exponents_are_refused() {
        for number in ["1.0", "0.5", "1e3", "-0.0", "18446744073709551616"] {
            let value: Value = serde_json::from_str(number).unwrap();
            assert!(matches!(canonical(&value), Err(CanonicalError::Fraction(_))), "{number}");
        }
        let deep = json!({ "a": [{ "b": 1.5 }] });
        assert!(canonical(&deep).unwrap_err().to_string().contains("1.5"));
    }

    /// JSON without fractions, three levels deep.
    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(".{0,4}", inner, 0..6)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_form_says_all_of_a_value_and_is_its_own_form(value in values()) {
            let form = canonical(&value).unwrap();
            let read: Value = serde_json::from_slice(&form).unwrap();
            prop_assert_eq!(&read, &value);
            prop_assert_eq!(canonical(&read).unwrap(), form);
        }
    }
}
