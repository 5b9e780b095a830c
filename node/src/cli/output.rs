//! How answers look: tables for people, JSON for programs.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::SystemTime;

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{ContentArrangement, LineStyle, Table, TableStyle};
use jiff::Timestamp;
use serde::Serialize;

use super::args::Output;
use super::exit::UsageError;

/// How wide tables are where no terminal says.
const WIDTH: u16 = 120;
/// A line beneath the headings and none between rows: what is looked for is many rows at once.
const STYLE: TableStyle = UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none());

/// Prints a list: a table under `headings`, or an array of objects.
pub(super) fn list<T: Serialize>(
    output: Output,
    headings: &[&str],
    items: &[T],
    row: impl Fn(&T) -> Vec<String>,
    none: &str,
) -> anyhow::Result<()> {
    match output {
        Output::Json => json(&items),
        Output::Human if items.is_empty() => line(none),
        Output::Human => {
            let mut table = Table::new();
            table.load_style(STYLE).set_content_arrangement(ContentArrangement::Dynamic);
            // Into a file or a pipe there is no width to keep to, but people still read it.
            if table.width().is_none() {
                table.set_width(WIDTH);
            }
            table.set_header(headings);
            table.add_rows(items.iter().map(row));
            line(table)
        }
    }
}

/// Prints one thing: a sentence, or an object.
pub(super) fn one<T: Serialize>(output: Output, thing: &T, sentence: impl Display) -> anyhow::Result<()> {
    match output {
        Output::Json => json(thing),
        Output::Human => line(sentence),
    }
}

/// Prints `name: value` lines, or an object.
pub(super) fn record<T: Serialize>(output: Output, thing: &T, fields: &[(&str, String)]) -> anyhow::Result<()> {
    match output {
        Output::Json => json(thing),
        Output::Human => self::fields(fields),
    }
}

/// Prints `name  value` lines, the values in one column.
pub(crate) fn fields(fields: &[(&str, String)]) -> anyhow::Result<()> {
    let width = fields.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    fields.iter().try_for_each(|(name, value)| line(format_args!("{name:width$}  {value}")))
}

/// Prints JSON on one line.
pub(crate) fn json<T: Serialize>(thing: &T) -> anyhow::Result<()> {
    line(serde_json::to_string(thing)?)
}

/// Prints a line.
pub(super) fn line(text: impl Display) -> anyhow::Result<()> {
    writeln!(io::stdout().lock(), "{text}").map_err(Into::into)
}

/// Says something to the person at the terminal, beside the answer.
pub(crate) fn note(text: impl Display) {
    // Nobody to tell if stderr is gone.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A time as people and programs read it.
pub(super) fn time(time: SystemTime) -> String {
    Timestamp::try_from(time).map(|time| format!("{time:.3}")).unwrap_or_default()
}

/// A protobuf time as people and programs read it.
pub(super) fn wire_time(time: Option<&prost_types::Timestamp>) -> Option<String> {
    let time = time?;
    Timestamp::new(time.seconds, time.nanos).ok().map(|time| format!("{time:.3}"))
}

/// Whether there is a person who could confirm something.
pub(super) fn somebody_is_there() -> bool {
    io::stdin().is_terminal()
}

/// Lets a person confirm what cannot be undone.
///
/// # Errors
/// [`UsageError`]: the answer was no, or there is nobody to ask.
pub(super) fn confirm(yes: bool, what: &str) -> anyhow::Result<()> {
    agree(yes, &format!("{what} This cannot be undone"))
}

/// Lets a person confirm what disturbs others: a sentence without its full stop.
///
/// # Errors
/// As [`confirm`].
pub(super) fn agree(yes: bool, what: &str) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    if !somebody_is_there() {
        return Err(UsageError(format!("{what}: confirm with --yes")).into());
    }
    let mut err = io::stderr().lock();
    write!(err, "{what}. Type yes to go on: ")?;
    err.flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    if answer.trim().eq_ignore_ascii_case("yes") {
        return Ok(());
    }
    Err(UsageError("not confirmed; nothing was done".to_owned()).into())
}

/// `1234567` as `1,234,567`.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        let texts: Vec<_> = [0, 999, 1_000, 12_345, 1_234_567].into_iter().map(thousands).collect();
        assert_eq!(texts, ["0", "999", "1,000", "12,345", "1,234,567"]);
    }
}
