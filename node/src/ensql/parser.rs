//! From tokens to a [`Query`].

use super::lexer::{Kind, Token, tokens};
use super::{Field, Query, SyntaxError};

const KEYWORDS: [&str; 10] = ["SELECT", "FROM", "WHERE", "AS", "OFFSET", "LIMIT", "AND", "OR", "LIKE", "ILIKE"];
const BOOLEANS: [&str; 10] = ["t", "T", "true", "True", "TRUE", "f", "F", "false", "False", "FALSE"];

/// How deep parentheses may nest: the parser must not be a way to exhaust a stack.
const DEPTH_MAX: usize = 64;

/// Reads a query.
///
/// # Errors
/// Where the text leaves the grammar, and what was expected there. Its author should change it.
pub fn parse(text: &str) -> Result<Query, SyntaxError> {
    let tokens = tokens(text.trim())?;
    if tokens.is_empty() {
        return Err(SyntaxError::Empty);
    }
    Parser { tokens: &tokens, at: 0 }.query()
}

struct Parser<'a, 'q> {
    tokens: &'a [Token<'q>],
    at: usize,
}

fn is_keyword(token: &Token<'_>) -> bool {
    KEYWORDS.iter().any(|keyword| token.is(keyword))
}

fn is_identifier(token: &Token<'_>) -> bool {
    token.kind == Kind::Word && !is_keyword(token) && !BOOLEANS.contains(&token.text)
}

impl<'q> Parser<'_, 'q> {
    fn peek(&self) -> Option<Token<'q>> {
        self.tokens.get(self.at).copied()
    }

    fn next(&mut self) -> Option<Token<'q>> {
        let token = self.peek();
        self.at += usize::from(token.is_some());
        token
    }

    fn query(&mut self) -> Result<Query, SyntaxError> {
        if let Some(first) = self.next().filter(|token| !token.is("SELECT")) {
            return Err(first.error("invalid query type"));
        }
        let mut query = Query { fields: self.fields()?, from: self.topic()?, ..Query::default() };
        if self.peek().is_some_and(|token| token.is("WHERE")) {
            self.next();
            self.condition(0)?;
            query.filtered = true;
        }
        self.tail(&mut query)?;
        Ok(query)
    }

    /// The select list; empty for `*`. Eats the FROM.
    fn fields(&mut self) -> Result<Vec<Field>, SyntaxError> {
        let mut fields = Vec::new();
        let mut star = false;
        loop {
            let Some(token) = self.next() else { return Err(SyntaxError::NoTopic) };
            if token.is_symbol("*") {
                star = true;
                if self.peek().is_some_and(|next| next.is("AS")) {
                    self.next();
                    return Err(self.peek().unwrap_or(token).error("cannot alias *"));
                }
            } else if is_identifier(&token) {
                fields.push(Field { name: token.text.to_owned(), alias: self.alias()? });
            } else if token.is("FROM") && fields.is_empty() && !star {
                return Err(SyntaxError::NoFields);
            } else {
                return Err(token.error("invalid field identifier"));
            }
            match self.next() {
                None => return Err(SyntaxError::NoTopic),
                Some(next) if next.is("FROM") => break,
                Some(next) if next.is_symbol(",") => {}
                Some(next) => return Err(next.error("invalid select fields statement")),
            }
        }
        if star && !fields.is_empty() {
            return Err(SyntaxError::StarAndFields);
        }
        Ok(fields)
    }

    fn alias(&mut self) -> Result<Option<String>, SyntaxError> {
        if !self.peek().is_some_and(|token| token.is("AS")) {
            return Ok(None);
        }
        self.next();
        match self.next() {
            None => Err(SyntaxError::NoTopic),
            Some(token) if is_identifier(&token) => Ok(Some(token.text.to_owned())),
            Some(token) => Err(token.error("invalid alias identifier")),
        }
    }

    /// A topic's name, perhaps with a schema and a version: a word, then what follows it without white space.
    fn topic(&mut self) -> Result<String, SyntaxError> {
        let Some(first) = self.next() else { return Err(SyntaxError::NoTopic) };
        if !is_identifier(&first) {
            return Err(first.error("invalid topic identifier"));
        }
        let mut name = first.text.to_owned();
        while let Some(dot) = self.peek().filter(|token| token.is_symbol(".")) {
            self.next();
            name.push('.');
            let mut pieces = 0;
            while let Some(piece) = self.peek().filter(|token| {
                let joins = matches!(token.kind, Kind::Word | Kind::Number) || token.is_symbol("*");
                joins && (!token.spaced || pieces == 0)
            }) {
                self.next();
                name.push_str(piece.text);
                pieces += 1;
            }
            if pieces == 0 {
                return Err(self.peek().unwrap_or(dot).error("invalid schema identifier"));
            }
        }
        Ok(name)
    }

    /// `cond {(AND | OR) cond}`, ending before whatever cannot continue it.
    fn condition(&mut self, depth: usize) -> Result<(), SyntaxError> {
        loop {
            self.predicate(depth)?;
            match self.peek() {
                Some(token) if token.is("AND") || token.is("OR") => self.at += 1,
                _ => return Ok(()),
            }
        }
    }

    fn predicate(&mut self, depth: usize) -> Result<(), SyntaxError> {
        let end = || SyntaxError::At { position: 0, near: String::new(), message: "invalid where clause" };
        let Some(first) = self.next() else {
            return Err(self.at_end("invalid where clause").unwrap_or_else(end));
        };
        if first.is_symbol("(") {
            if depth == DEPTH_MAX {
                return Err(first.error("too many nested parentheses"));
            }
            self.condition(depth + 1)?;
            return match self.next() {
                Some(token) if token.is_symbol(")") => Ok(()),
                Some(token) => Err(token.error("cannot append or update condition in group")),
                None => Err(first.error("missing closing parenthesis")),
            };
        }
        if !is_identifier(&first) {
            return Err(first.error("invalid where clause"));
        }
        let compares = |token: &Token<'_>| token.kind == Kind::Operator || token.is("LIKE") || token.is("ILIKE");
        match self.next() {
            Some(token) if compares(&token) => {}
            Some(token) if token.is("AND") || token.is("OR") => {
                return Err(token.error("where clause expressions require comparison operators"));
            }
            Some(token) => return Err(token.error("invalid where clause")),
            None => return Err(self.at_end("invalid where clause").unwrap_or_else(end)),
        }
        match self.next() {
            Some(token) if matches!(token.kind, Kind::Quoted | Kind::Number) => Ok(()),
            Some(token) if BOOLEANS.contains(&token.text) => Ok(()),
            Some(token) => Err(token.error("invalid where clause")),
            None => Err(self.at_end("invalid where clause").unwrap_or_else(end)),
        }
    }

    /// An error just past the last token.
    fn at_end(&self, message: &'static str) -> Option<SyntaxError> {
        let last = self.tokens.last()?;
        Some(SyntaxError::At { position: last.position + last.text.len(), near: String::new(), message })
    }

    /// OFFSET and LIMIT, once each, in either order; then any number of semicolons.
    fn tail(&mut self, query: &mut Query) -> Result<(), SyntaxError> {
        let mut offset = None;
        let mut misplaced =
            if query.filtered { "cannot append or update condition in group" } else { "invalid from clause" };
        while let Some(token) = self.next() {
            if token.is("OFFSET") {
                let set = self.number("invalid offset", "could not parse offset")?;
                self.once(offset.replace(set), "offset has already been set")?;
                misplaced = "invalid offset clause";
            } else if token.is("LIMIT") {
                let set = self.number("invalid limit", "could not parse limit")?;
                self.once(query.limit.replace(set), "limit has already been set")?;
                misplaced = "invalid limit clause";
            } else if token.is_symbol(";") {
                misplaced = "nothing may follow the end of the query";
                if let Some(other) = self.peek().filter(|next| !next.is_symbol(";")) {
                    return Err(other.error(misplaced));
                }
            } else if query.filtered && token.is_symbol(")") && misplaced.starts_with("cannot append") {
                return Err(token.error("cannot close expression parentheses"));
            } else {
                return Err(token.error(misplaced));
            }
        }
        query.offset = offset.unwrap_or(0);
        Ok(())
    }

    fn number(&mut self, not_a_number: &'static str, not_parsed: &'static str) -> Result<u64, SyntaxError> {
        match self.next() {
            Some(token) if token.kind == Kind::Number => token.text.parse().map_err(|_| token.error(not_parsed)),
            Some(token) => Err(token.error(not_a_number)),
            None => Err(self.at_end(not_a_number).unwrap_or(SyntaxError::Empty)),
        }
    }

    /// The number just read must be the first of its kind.
    fn once(&self, before: Option<u64>, message: &'static str) -> Result<(), SyntaxError> {
        let number = self.tokens[self.at - 1];
        before.map_or(Ok(()), |_| Err(number.error(message)))
    }
}
