//! `OpenMetrics` text, read back.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

/// Samples.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Vec<Sample>);

/// One sample.
#[derive(Clone, Debug)]
pub struct Sample {
    /// With its suffix.
    pub name: String,
    /// In their order.
    pub labels: Vec<(String, String)>,
    /// Its value.
    pub value: f64,
}

impl Sample {
    /// A label's value; the empty string where it is not there.
    #[must_use]
    pub fn label(&self, name: &str) -> &str {
        self.labels.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
    }
}

impl Metrics {
    /// Reads the text, which is to end as `OpenMetrics` does.
    pub fn parse(text: &str) -> Result<Self> {
        if !text.ends_with("# EOF\n") {
            bail!("the metrics do not end in # EOF");
        }
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let samples: Result<_> = samples
            .map(|line| sample(line).with_context(|| format!("not a sample: {line}")))
            .collect();
        Ok(Self(samples?))
    }

    /// All samples.
    #[must_use]
    pub fn samples(&self) -> &[Sample] {
        &self.0
    }

    /// The samples of this name with these labels.
    pub fn find<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        let named = self.0.iter().filter(move |sample| sample.name == name);
        named.filter(move |sample| labels.iter().all(|(key, value)| sample.label(key) == *value))
    }

    /// The sum of the samples of this name with these labels.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.find(name, labels).map(|sample| sample.value).sum()
    }

    /// The names there are.
    #[must_use]
    pub fn names(&self) -> BTreeMap<&str, usize> {
        let mut names = BTreeMap::new();
        for sample in &self.0 {
            *names.entry(sample.name.as_str()).or_default() += 1;
        }
        names
    }
}

fn sample(line: &str) -> Option<Sample> {
    let at = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(at);
    let mut labels = Vec::new();
    if let Some(list) = rest.strip_prefix('{') {
        rest = list;
        while let Some((key, after)) = rest.split_once("=\"") {
            let (mut value, mut end) = (String::new(), None);
            let mut characters = after.char_indices();
            while let Some((at, character)) = characters.next() {
                match character {
                    '"' => {
                        end = Some(at + 1);
                        break;
                    }
                    '\\' => value.push(match characters.next()?.1 {
                        'n' => '\n',
                        other => other,
                    }),
                    other => value.push(other),
                }
            }
            labels.push((key.to_owned(), value));
            rest = after.get(end?..)?;
            match rest.strip_prefix(',') {
                Some(next) => rest = next,
                None => break,
            }
        }
        rest = rest.strip_prefix('}')?;
    }
    let value = rest.strip_prefix(' ')?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read() {
        let text = "# TYPE a counter\na_total{x=\"1\",y=\"q\\\"\\n{}\"} 2\na_total{x=\"2\"} 3\nb 1.5\n# EOF\n";
        let metrics = Metrics::parse(text).unwrap();
        assert!((metrics.sum("a_total", &[]) - 5.0).abs() < 1e-9);
        assert!((metrics.sum("a_total", &[("x", "2")]) - 3.0).abs() < 1e-9);
        assert_eq!(metrics.find("a_total", &[("x", "1")]).next().unwrap().label("y"), "q\"\n{}");
        assert_eq!(metrics.names().len(), 2);
    }

    #[test]
    fn what_is_not_openmetrics_is_refused() {
        for text in ["a 1\n", "a\n# EOF\n", "a{x=\"1} 1\n# EOF\n", "a{x=\"1\" 1\n# EOF\n"] {
            assert!(Metrics::parse(text).is_err(), "{text}");
        }
    }
}
