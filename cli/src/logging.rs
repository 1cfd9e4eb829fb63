//! The log of a program: one line on stderr for each event.

use std::fmt::{self, Debug, Write};
use std::io::IsTerminal;

use clap::ValueEnum;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::{FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use crate::report_error::escape;

/// Format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line of text for each event
    Text,
    /// One JSON object for each event
    Json,
}

/// Target of the spans that carry the name of a device. They are enabled whatever the filter
/// says, so that a filter for one module keeps the name in its lines.
pub const DEVICE_SPAN: &str = "outrigger::device";

/// Starts logging. `filter` has the syntax of [`EnvFilter`].
///
/// Text is the level, the fields of the spans, the message, and the fields of the event, for
/// example `WARN disk0: queue 1: request failed request=7 error=...`. JSON has the fields of
/// the event in `fields`, the innermost span in `span` and all spans in `spans`.
///
/// # Errors
/// `filter` is not valid.
pub fn init(format: LogFormat, filter: &str) -> Result<(), String> {
    let error = |why: &dyn fmt::Display| format!("--log-level {filter}: {why}");
    let spans = format!("{DEVICE_SPAN}=error");
    let spans = spans.parse().map_err(|e| error(&e))?;
    let filter = EnvFilter::try_new(filter).map_err(|e| error(&e))?;
    let filter = filter.add_directive(spans);
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder
            .fmt_fields(TextFields)
            .event_format(TextEvent)
            .init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

/// Formats an event as a line of text.
struct TextEvent;

impl<S, N> FormatEvent<S, N> for TextEvent
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write_level(&mut writer, *event.metadata().level())?;
        for span in context
            .event_scope()
            .into_iter()
            .flat_map(|s| s.from_root())
        {
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>()
                && !fields.is_empty()
            {
                write!(writer, "{fields}: ")?;
            }
        }
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Writes the level, in colour on a terminal.
fn write_level(writer: &mut Writer<'_>, level: Level) -> fmt::Result {
    if !writer.has_ansi_escapes() {
        return write!(writer, "{:>5} ", level.as_str());
    }
    let colour = match level {
        Level::ERROR => 31,
        Level::WARN => 33,
        Level::INFO => 32,
        Level::DEBUG => 34,
        _ => 35,
    };
    write!(writer, "\x1b[{colour}m{:>5}\x1b[0m ", level.as_str())
}

/// Formats the fields of an event as `message name=value`, and the fields of a span, which has
/// no message, as `name value`. A span's field `device` is only its value.
struct TextFields;

impl<'writer> FormatFields<'writer> for TextFields {
    fn format_fields<R: RecordFields>(
        &self,
        mut writer: Writer<'writer>,
        fields: R,
    ) -> fmt::Result {
        let mut collected = CollectedFields::default();
        fields.record(&mut collected);
        let (message, fields) = (collected.message, collected.fields);
        let is_span = message.is_none();
        let mut line = message.unwrap_or_default();
        for (name, value, text) in fields {
            let separator = if is_span { ": " } else { " " };
            if !line.is_empty() {
                line.push_str(separator);
            }
            match (is_span, name) {
                (true, "device") => line.push_str(text.as_ref().unwrap_or(&value)),
                (true, _) => write!(line, "{name} {}", text.as_ref().unwrap_or(&value))?,
                (false, _) => write!(line, "{name}={value}")?,
            }
        }
        writer.write_str(&escape(&line))
    }
}

/// The fields of an event or span.
#[derive(Default)]
struct CollectedFields {
    message: Option<String>,
    /// Name, value in debug form, and for a string the text without quotes.
    fields: Vec<(&'static str, String, Option<String>)>,
}

impl Visit for CollectedFields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = Some(value.to_owned());
        } else {
            let quoted = format!("{value:?}");
            self.fields
                .push((field.name(), quoted, Some(value.to_owned())));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = Some(text);
        } else {
            self.fields.push((field.name(), text, None));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_of_text_has_level_spans_message_and_fields() {
        let output = Output::default();
        let writer = output.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .fmt_fields(TextFields)
            .event_format(TextEvent)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("started");
            let device = tracing::info_span!("device", device = "disk0");
            let _entered = device.enter();
            let queue = tracing::info_span!("queue", queue = 1);
            let _entered = queue.enter();
            tracing::warn!(request = 7, operation = "read", error = %"a\nb", "failed");
        });
        let text = String::from_utf8(output.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                " INFO started",
                r#" WARN disk0: queue 1: failed request=7 operation="read" error=a\nb"#,
            ]
        );
    }
}
