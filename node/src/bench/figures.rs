//! Figures beside what they should be.

use serde::Serialize;

use crate::cli::{Output, print_json, print_record};

/// What was measured, what it should be, and their ratio.
#[derive(Debug, Serialize)]
pub(super) struct Figure {
    name: &'static str,
    value: f64,
    unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<Target>,
    /// 1 is just as it should be, less is better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ratio: Option<f64>,
}

#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Target {
    AtMost(f64),
    AtLeast(f64),
}

impl Figure {
    pub(super) fn new(name: &'static str, value: f64, unit: &'static str, target: Option<Target>) -> Self {
        let ratio = target.map(|target| match target {
            Target::AtMost(most) => value / most,
            Target::AtLeast(least) => least / value.max(f64::MIN_POSITIVE),
        });
        Self { name, value, unit, target, ratio }
    }

    fn text(&self) -> String {
        let value = format!("{:.2} {}", self.value, self.unit);
        match (self.target, self.ratio) {
            (Some(Target::AtMost(most)), Some(ratio)) => {
                format!("{value:24} at most {most} {}, ratio {ratio:.2}", self.unit)
            }
            (Some(Target::AtLeast(least)), Some(ratio)) => {
                format!("{value:24} at least {least} {}, ratio {ratio:.2}", self.unit)
            }
            _ => value,
        }
    }
}

/// Prints a report: all of it for programs, its figures for people.
pub(super) fn print(output: Output, report: &impl Serialize, figures: &[Figure]) -> anyhow::Result<()> {
    match output {
        Output::Json => print_json(report),
        Output::Human => {
            let lines: Vec<_> = figures.iter().map(|figure| (figure.name, figure.text())).collect();
            print_record(&lines)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_was_measured_and_what_it_should_be() {
        let figures = vec![
            Figure::new("creation", 12.5, "s", Some(Target::AtMost(60.0))),
            Figure::new("all to one", 80.0, "%", Some(Target::AtLeast(50.0))),
            Figure::new("throughput", 1000.0, "events/s", None),
        ];
        let texts: Vec<_> = figures.iter().map(Figure::text).collect();
        assert_eq!(texts[0].split_whitespace().collect::<Vec<_>>().join(" "), "12.50 s at most 60 s, ratio 0.21");
        assert_eq!(texts[1].split_whitespace().collect::<Vec<_>>().join(" "), "80.00 % at least 50 %, ratio 0.62");
        let json = serde_json::to_value(&figures).unwrap();
        assert_eq!(json[0]["target"]["at_most"], 60.0);
        assert!(json[2].get("target").is_none());
    }
}
