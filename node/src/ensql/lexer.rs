//! Words, numbers, quoted text and symbols, each with its place.

use super::SyntaxError;

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Letters, digits, `_` and `-`, not beginning with a digit or `-`. Keywords are words.
    Word,
    /// Begins with a digit or `-`; then any of `-`, `.` and digits.
    Number,
    /// Between single quotes.
    Quoted,
    /// A comparison operator.
    Operator,
    /// One of `* , . ( ) ;`.
    Symbol,
    /// Nothing that the language knows.
    Unknown,
}

/// A token and its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token<'a> {
    pub(super) kind: Kind,
    /// Without quotes.
    pub(super) text: &'a str,
    /// Byte index of its first character.
    pub(super) position: usize,
    /// Whether white space, or the beginning, stands before it.
    pub(super) spaced: bool,
}

impl Token<'_> {
    pub(super) fn is(&self, keyword: &str) -> bool {
        self.kind == Kind::Word && self.text.eq_ignore_ascii_case(keyword)
    }

    pub(super) fn is_symbol(&self, symbol: &str) -> bool {
        self.kind == Kind::Symbol && self.text == symbol
    }

    pub(super) fn error(&self, message: &'static str) -> SyntaxError {
        SyntaxError::At { position: self.position, near: self.text.chars().take(64).collect(), message }
    }
}

/// Splits a trimmed query into tokens.
pub(super) fn tokens(query: &str) -> Result<Vec<Token<'_>>, SyntaxError> {
    let mut tokens = Vec::new();
    let mut at = 0;
    let mut spaced = true;
    while let Some(first) = query[at..].chars().next() {
        if first.is_whitespace() {
            at += first.len_utf8();
            spaced = true;
            continue;
        }
        let (token, end) = token_at(query, at, first, spaced)?;
        tokens.push(token);
        at = end;
        spaced = false;
    }
    Ok(tokens)
}

fn token_at(query: &str, at: usize, first: char, spaced: bool) -> Result<(Token<'_>, usize), SyntaxError> {
    let rest = &query[at..];
    let token = |kind, length: usize| (Token { kind, text: &rest[..length], position: at, spaced }, at + length);
    let span = |belongs: fn(char) -> bool| rest.find(|c| !belongs(c)).unwrap_or(rest.len());
    Ok(match first {
        'a'..='z' | 'A'..='Z' | '_' => token(Kind::Word, span(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')),
        '0'..='9' | '-' => token(Kind::Number, span(|c| c.is_ascii_digit() || c == '.' || c == '-')),
        '\'' => {
            let Some(length) = closing_quote(&rest[1..]) else {
                let near = rest.chars().take(5).collect();
                return Err(SyntaxError::At { position: at, near, message: "quoted string missing closing quote" });
            };
            let text = &rest[1..=length];
            (Token { kind: Kind::Quoted, text, position: at, spaced }, at + length + 2)
        }
        '*' | ',' | '.' | '(' | ')' | ';' => token(Kind::Symbol, 1),
        '!' if rest.starts_with("!=") => token(Kind::Operator, 2),
        '<' if rest.starts_with("<>") || rest.starts_with("<=") => token(Kind::Operator, 2),
        '>' if rest.starts_with(">=") => token(Kind::Operator, 2),
        '=' | '<' | '>' => token(Kind::Operator, 1),
        other => token(Kind::Unknown, other.len_utf8()),
    })
}

/// The length of the text before the closing quote; `\'` does not close.
fn closing_quote(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            '\'' if !escaped => return Some(at),
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    None
}
