//! From `tracing` events to lines.

use std::cell::Cell;
use std::error::Error;
use std::fmt;
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::{LookupSpan, SpanRef};

use super::format::{Fields, Line, Shape, with_buffer, write_to};
use super::sink::Sink;

thread_local! {
    static LINE: Cell<String> = const { Cell::new(String::new()) };
    static MESSAGE: Cell<String> = const { Cell::new(String::new()) };
    static SPANS: Cell<String> = const { Cell::new(String::new()) };
}

/// Prints events that the filter wants.
pub(super) struct Printer(Arc<Sink>);

/// The fields of a span, printed.
struct Printed(String);

impl Printer {
    pub(super) const fn new(sink: Arc<Sink>) -> Self {
        Self(sink)
    }

    fn wants(&self, metadata: &Metadata<'_>) -> bool {
        self.0.level(metadata.target()) >= *metadata.level()
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Printer {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // Depends on nothing but the filter, whose change asks again.
        if self.wants(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        self.wants(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.0.max_level())
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut text = String::new();
        attributes.record(&mut Visitor(&mut Fields::new(&mut text, self.0.shape)));
        span.extensions_mut().insert(Printed(text));
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut added = String::new();
        values.record(&mut Visitor(&mut Fields::new(&mut added, self.0.shape)));
        let mut extensions = span.extensions_mut();
        if let Some(Printed(text)) = extensions.get_mut::<Printed>() {
            if !text.is_empty() {
                text.push_str(match self.0.shape {
                    Shape::Plain => " ",
                    Shape::Json => ",",
                });
            }
            text.push_str(&added);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let sink = &self.0;
        let metadata = event.metadata();
        with_buffer(&SPANS, |spans| {
            for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
                print_span(spans, sink.shape, &span);
            }
            with_buffer(&MESSAGE, |message| {
                event.record(&mut Message(message));
                with_buffer(&LINE, |out| {
                    let line = Line {
                        time: sink.clock.now(),
                        level: *metadata.level(),
                        target: metadata.target(),
                        spans,
                        message,
                    };
                    line.write(out, sink.shape, |fields| event.record(&mut Visitor(fields)));
                    sink.push(out);
                });
            });
        });
    }
}

fn print_span<S: for<'a> LookupSpan<'a>>(out: &mut String, shape: Shape, span: &SpanRef<'_, S>) {
    let extensions = span.extensions();
    let fields = extensions.get::<Printed>().map_or("", |Printed(text)| text);
    match shape {
        Shape::Plain if fields.is_empty() => write_to(out, format_args!(":{}", span.name())),
        Shape::Plain => write_to(out, format_args!(":{}{{{fields}}}", span.name())),
        Shape::Json => write_to(out, format_args!(",\"{}\":{{{fields}}}", span.name())),
    }
}

const MESSAGE_FIELD: &str = "message";

/// Takes the message alone.
struct Message<'a>(&'a mut String);

impl Visit for Message<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == MESSAGE_FIELD {
            write_to(self.0, format_args!("{value:?}"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == MESSAGE_FIELD {
            self.0.push_str(value);
        }
    }
}

/// Prints the fields but the message.
struct Visitor<'a, 'b>(&'a mut Fields<'b>);

impl Visit for Visitor<'_, '_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() != MESSAGE_FIELD {
            self.0.display(field.name(), format_args!("{value:?}"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() != MESSAGE_FIELD {
            self.0.str(field.name(), value);
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.number(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.literal(field.name(), format_args!("{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.literal(field.name(), format_args!("{value}"));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        if value.is_finite() {
            self.0.literal(field.name(), format_args!("{value}"));
        } else {
            // JSON has no such numbers.
            self.0.display(field.name(), format_args!("{value}"));
        }
    }

    /// The error and its causes: each prints one level (house §6).
    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.0.text(field.name(), Chain(value));
    }
}

struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
