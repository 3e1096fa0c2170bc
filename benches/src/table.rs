//! The table of a bench run, for the terminal and as dated JSON lines.

use serde_json::{json, Value};

/// One row: a measured value and, for a ratio or a limit, the mark to reach (at most).
#[derive(Debug, Clone)]
pub struct Row {
    /// What is measured.
    pub measure: String,
    /// The value.
    pub value: f64,
    /// Its unit: `ms`, `x`, `MiB`.
    pub unit: &'static str,
    /// At most this is to be reached.
    pub mark: Option<f64>,
    /// Whether CI guards it: a ratio of things measured in the same run.
    pub guarded: bool,
}

impl Row {
    /// A value that is only reported.
    pub fn report(measure: impl Into<String>, value: f64, unit: &'static str) -> Row {
        Row { measure: measure.into(), value, unit, mark: None, guarded: false }
    }

    /// A ratio with its mark, guarded.
    pub fn ratio(measure: impl Into<String>, value: f64, mark: f64) -> Row {
        Row { measure: measure.into(), value, unit: "x", mark: Some(mark), guarded: true }
    }

    /// An absolute value with its mark.
    pub fn limit(measure: impl Into<String>, value: f64, unit: &'static str, mark: f64) -> Row {
        Row { mark: Some(mark), ..Row::report(measure, value, unit) }
    }

    /// Worse than its mark by half: what CI calls a failure, if it happens twice in a row.
    pub fn is_far_off(&self) -> bool {
        self.guarded && self.mark.is_some_and(|mark| self.value > mark * 1.5)
    }

    /// For the results file.
    pub fn json(&self) -> Value {
        json!({ "measure": self.measure, "value": (self.value * 1e4).round() / 1e4, "unit": self.unit, "mark": self.mark })
    }
}

/// The table as text.
pub fn text(rows: &[Row]) -> String {
    let mut lines = vec![format!("{:<64} {:>10} {:>10}", "measure", "value", "to reach")];
    for row in rows {
        let mark = row.mark.map_or(String::new(), |mark| format!("≤ {}", number(mark, row.unit)));
        let verdict = match row.mark {
            Some(mark) if row.value <= mark => " ok",
            Some(_) => " MISSED",
            None => "",
        };
        lines.push(format!("{:<64} {:>10} {mark:>10}{verdict}", row.measure, number(row.value, row.unit)));
    }
    lines.join("\n")
}

fn number(value: f64, unit: &str) -> String {
    match unit {
        "x" if value < 0.1 => format!("1/{:.0}", 1.0 / value.max(1e-9)),
        "x" => format!("{value:.2}"),
        _ => format!("{value:.1} {unit}"),
    }
}
