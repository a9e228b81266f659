//! Claims of a token, as gRPC has them (`google.protobuf.Struct`) and as JSON.

use prost_types::value::Kind;
use serde_json::{Map, Number, Value};

/// Largest whole number that a float holds with all those below it.
const MAX_WHOLE: f64 = 9_007_199_254_740_992.0;

/// Claims as gRPC has them. A number beyond a float's whole numbers loses its last digits, as everywhere in this format.
pub fn to_struct(claims: Map<String, Value>) -> prost_types::Struct {
    let fields = claims.into_iter().map(|(key, value)| (key, to_value(value)));
    prost_types::Struct { fields: fields.collect() }
}

fn to_value(value: Value) -> prost_types::Value {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(flag) => Kind::BoolValue(flag),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(all) => {
            Kind::ListValue(prost_types::ListValue { values: all.into_iter().map(to_value).collect() })
        }
        Value::Object(fields) => Kind::StructValue(to_struct(fields)),
    };
    prost_types::Value { kind: Some(kind) }
}

/// Claims as JSON: a number without a fraction is a whole one again, and what is no JSON is null.
pub fn from_struct(claims: prost_types::Struct) -> Map<String, Value> {
    claims.fields.into_iter().map(|(key, value)| (key, from_value(value))).collect()
}

fn from_value(value: prost_types::Value) -> Value {
    match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(flag)) => Value::Bool(flag),
        Some(Kind::NumberValue(number)) => from_number(number),
        Some(Kind::StringValue(text)) => Value::String(text),
        Some(Kind::ListValue(all)) => Value::Array(all.values.into_iter().map(from_value).collect()),
        Some(Kind::StructValue(fields)) => Value::Object(from_struct(fields)),
    }
}

fn from_number(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() <= MAX_WHOLE {
        // Exact by these bounds.
        #[allow(clippy::cast_possible_truncation)]
        return Value::from(number as i64);
    }
    Number::from_f64(number).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_the_same_after_the_way_through_grpc() {
        let claims = serde_json::json!({
            "sub": "spiffe://td/a", "aud": ["me"], "exp": 1_800_000_000, "below": -2, "part": 1.5, "none": null,
            "yes": true, "deep": { "er": [1, { "x": "y" }] },
        });
        let Value::Object(claims) = claims else { panic!() };
        assert_eq!(from_struct(to_struct(claims.clone())), claims);
    }

    #[test]
    fn what_json_cannot_say_is_null() {
        let of = |kind| prost_types::Struct { fields: [("x".to_owned(), prost_types::Value { kind })].into() };
        for kind in [None, Some(Kind::NumberValue(f64::NAN)), Some(Kind::NumberValue(f64::INFINITY))] {
            assert_eq!(from_struct(of(kind))["x"], Value::Null);
        }
        assert_eq!(from_struct(of(Some(Kind::NumberValue(1e300))))["x"], serde_json::json!(1e300));
    }
}
