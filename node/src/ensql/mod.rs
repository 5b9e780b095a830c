//! EnSQL: what a query says, before anything is read.
//!
//! The grammar is the published one (`SELECT fields FROM topic [WHERE …] [OFFSET n] [LIMIT n] [;]`), with two repairs: words have
//! boundaries, so `orders` is a topic; and a topic's name may hold dots. What is run today is `SELECT * FROM topic` with an
//! offset and a limit; every other valid clause is recognised, so that [`Query::unsupported`] can name it.

mod lexer;
mod parser;

use thiserror::Error;

pub use parser::parse;

/// A query that is well formed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Query {
    /// The projected fields with their aliases; empty for `*`.
    pub fields: Vec<Field>,
    /// What stands after `FROM`, dots included: a topic's name, perhaps followed by `.schema` and `.version`.
    pub from: String,
    /// There is a WHERE clause.
    pub filtered: bool,
    /// How many events to skip.
    pub offset: u64,
    /// How many events to return at most.
    pub limit: Option<u64>,
}

/// One projected field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: String,
    /// What to call it in the answer.
    pub alias: Option<String>,
}

impl Query {
    /// What the query asks for and this server does not do yet, in words for its author.
    pub fn unsupported(&self) -> Option<&'static str> {
        if !self.fields.is_empty() {
            return Some(
                "selecting fields is not supported yet; supported is SELECT * FROM topic [OFFSET n] [LIMIT n]",
            );
        }
        self.filtered.then_some("WHERE is not supported yet; supported is SELECT * FROM topic [OFFSET n] [LIMIT n]")
    }

    /// Every reading of [`Query::from`] that names a topic and a schema, the longest topic name first.
    pub fn topic_prefixes(&self) -> impl Iterator<Item = &str> {
        self.from.rmatch_indices('.').map(|(at, _)| &self.from[..at])
    }
}

/// Why a text is not a query. The texts are what clients have come to expect.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SyntaxError {
    /// At a place.
    #[error("syntax error at position {position} near {near:?}: {message}")]
    At {
        /// Byte index in the trimmed query.
        position: usize,
        /// The token there.
        near: String,
        /// What was expected.
        message: &'static str,
    },
    /// Nothing but white space.
    #[error("empty query is invalid")]
    Empty,
    /// It ends before naming a topic.
    #[error("topic name cannot be empty")]
    NoTopic,
    /// `SELECT FROM …`.
    #[error("SELECT requires field projection or *")]
    NoFields,
    /// `SELECT *, name FROM …`.
    #[error("cannot select * and specify fields")]
    StarAndFields,
}

#[cfg(test)]
mod tests;
