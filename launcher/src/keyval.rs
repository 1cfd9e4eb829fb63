//! `key=value,key=value` options, read into the same structures as the VM file.
//! A first word without `=` is the value of `type`.

use std::fmt::Display;

use serde::de::value::{MapDeserializer, StrDeserializer};
use serde::de::{self, DeserializeOwned, Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

/// Parses `text`.
///
/// # Errors
/// Names the key that is unknown, missing, given twice or has a wrong value.
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
        pairs.push((key, Value(value)));
    }
    T::deserialize(MapDeserializer::new(pairs.into_iter()))
        .map_err(|error: de::value::Error| error.to_string())
}

/// A value in text form; what it means depends on what is expected.
#[derive(Clone, Copy)]
struct Value<'a>(&'a str);

impl<'de> IntoDeserializer<'de> for Value<'de> {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, de::value::Error>
where
    T::Err: Display,
{
    text.parse()
        .map_err(|error| de::Error::custom(format!("{text:?}: {error}")))
}

impl<'de> Deserializer<'de> for Value<'de> {
    type Error = de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_borrowed_str(self.0)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_some(self)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self.0 {
            "on" | "true" => visitor.visit_bool(true),
            "off" | "false" => visitor.visit_bool(false),
            other => Err(de::Error::custom(format!(
                "{other:?} is neither on nor off"
            ))),
        }
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_u8(number(self.0)?)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_u16(number(self.0)?)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        StrDeserializer::new(self.0).deserialize_enum(name, variants, visitor)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 u32 u64 f32 f64 char str string bytes byte_buf unit
        unit_struct newtype_struct seq tuple tuple_struct map struct identifier
        ignored_any
    }
}
