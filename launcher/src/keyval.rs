//! `key=value,key=value` options, deserialized into the same structures as the VM file. A
//! first word without `=` is the value of `type`.

use std::fmt::Display;
use std::str::FromStr;

use serde::de::value::{MapDeserializer, StrDeserializer};
use serde::de::{self, DeserializeOwned, Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use crate::nearest;

/// Parses `text`.
///
/// # Errors
/// A key is unknown, missing or given twice, or has an invalid value. The message names it.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut pairs: Vec<(&str, Value<'_>)> = Vec::new();
    for (index, part) in text.split(',').enumerate() {
        let (key, value) = match part.split_once('=') {
            Some(pair) => pair,
            None if index == 0 => ("type", part),
            None => return Err(format!("{part:?} is not key=value")),
        };
        if pairs.iter().any(|pair| pair.0 == key) {
            return Err(format!("{key} is given twice"));
        }
        pairs.push((key, Value { key, text: value }));
    }
    T::deserialize(MapDeserializer::new(pairs.into_iter()))
        .map_err(|error: de::value::Error| nearest::explain(&error.to_string()))
}

/// A value in text form. It is parsed as the type that the structure expects.
#[derive(Clone, Copy)]
struct Value<'a> {
    key: &'a str,
    text: &'a str,
}

impl<'de> IntoDeserializer<'de> for Value<'de> {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

impl Value<'_> {
    fn number<T: FromStr<Err: Display>>(self) -> Result<T, de::value::Error> {
        self.text.parse().map_err(|error| self.invalid(error))
    }

    fn invalid(self, why: impl Display) -> de::value::Error {
        de::Error::custom(format!("{}={}: {why}", self.key, self.text))
    }
}

impl<'de> Deserializer<'de> for Value<'de> {
    type Error = de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_borrowed_str(self.text)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_some(self)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self.text {
            "on" | "true" => visitor.visit_bool(true),
            "off" | "false" => visitor.visit_bool(false),
            _ => Err(self.invalid("use on or off")),
        }
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_u8(self.number()?)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_u16(self.number()?)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_u32(self.number()?)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        StrDeserializer::new(self.text).deserialize_enum(name, variants, visitor)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 u64 f32 f64 char str string bytes byte_buf unit
        unit_struct newtype_struct seq tuple tuple_struct map struct identifier
        ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DiskConfig, NetConfig};

    #[test]
    fn an_error_names_the_key() {
        for (text, message) in [
            ("path=a,path=b", "path is given twice"),
            ("path=a,readonly", "\"readonly\" is not key=value"),
            ("path=a,readonly=perhaps", "readonly=perhaps: use on or off"),
            ("readonly=on", "missing field `path`"),
        ] {
            assert_eq!(parse::<DiskConfig>(text).unwrap_err(), message);
        }
        let error = parse::<DiskConfig>("path=a,queues=many").unwrap_err();
        assert!(error.starts_with("queues=many: "), "{error}");
        let error = parse::<DiskConfig>("path=a,poll-us=-1").unwrap_err();
        assert!(error.starts_with("poll-us=-1: "), "{error}");
        let error = parse::<DiskConfig>("path=a,format=vmdk").unwrap_err();
        assert!(error.contains("unknown value `vmdk`"), "{error}");
        let error = parse::<NetConfig>("isolated,mtu=70000").unwrap_err();
        assert!(error.starts_with("mtu=70000: "), "{error}");
    }
}
