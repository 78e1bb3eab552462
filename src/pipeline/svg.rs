//! A timeline as a drawing, like figure 5 of the report.

use std::fmt::{Arguments, Write};

use deepburn_train::pipeline::schedule::{Action, Chunk, Direction, Span};

use super::{Plan, number};

/// Width of a forward pass. Everything else is in proportion.
const FORWARD: f64 = 24.0;
/// No viewer shows more.
const WIDEST: f64 = 60_000.0;
const LEFT: f64 = 72.0;
const TOP: f64 = 66.0;
const ROW: f64 = 26.0;
const GAP: f64 = 4.0;
/// Width of a digit in a box.
const DIGIT: f64 = 6.8;

/// A kind of box: name, colour of what comes from rank 0, colour of what goes there.
type Kind = (&'static str, [&'static str; 2]);
const FORWARD_KIND: Kind = ("Forward", ["#f0a44b", "#fbe0bd"]);
const BACKWARD_KIND: Kind = ("Backward", ["#6fb27c", "#d0ead5"]);
const INPUT_KIND: Kind = ("Backward for input", ["#4fb3bf", "#c9ebee"]);
const WEIGHT_KIND: Kind = ("Backward for weights", ["#7b97d3", "#d5dff4"]);

struct Drawing<'a> {
    plan: &'a Plan,
    /// Pixels per unit of time.
    scale: f64,
    text: String,
}

/// The whole file.
pub(super) fn draw(plan: &Plan) -> String {
    let makespan = plan.simulation.makespan;
    let scale = (FORWARD / plan.costs.forward).min(WIDEST / makespan);
    let mut drawing = Drawing {
        plan,
        scale,
        text: String::new(),
    };
    let width = (LEFT + makespan * scale + 20.0).max(1000.0);
    let bottom = TOP + plan.ranks() as f64 * (ROW + GAP);
    drawing.head(width, bottom + 96.0);
    for rank in 0..plan.ranks() {
        drawing.rank(rank);
    }
    drawing.axis(bottom);
    drawing.legend(bottom + 44.0);
    drawing.text + "</svg>\n"
}

impl Drawing<'_> {
    fn put(&mut self, content: Arguments<'_>) {
        writeln!(self.text, "{content}").expect("a string takes whatever is written to it");
    }

    fn head(&mut self, width: f64, height: f64) {
        let plan = self.plan;
        self.put(format_args!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{height:.0}" viewBox="0 0 {width:.0} {height:.0}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#1c1c1c">"##
        ));
        self.put(format_args!(
            r##"<rect width="100%" height="100%" fill="#ffffff"/>"##
        ));
        let escaped = plan.headline().replace('&', "&amp;");
        let (title, costs) = escaped.split_once("; ").unwrap_or((&escaped, ""));
        self.put(format_args!(
            r##"<text x="{LEFT}" y="24" font-size="16" font-weight="bold">{title}</text>"##
        ));
        let (makespan, bubble) = (number(plan.simulation.makespan), number(plan.bubble()));
        self.put(format_args!(
            r##"<text x="{LEFT}" y="46">Makespan {makespan}, bubble {bubble} on the rank with the largest; {costs}.</text>"##
        ));
    }

    fn rank(&mut self, rank: usize) {
        let plan = self.plan;
        let top = TOP + rank as f64 * (ROW + GAP);
        let (middle, right) = (top + ROW / 2.0 + 4.0, LEFT - 8.0);
        let whole = px(plan.simulation.makespan * self.scale);
        self.put(format_args!(
            r##"<text x="{right}" y="{middle}" text-anchor="end">Rank {rank}</text>"##
        ));
        self.put(format_args!(
            r##"<rect x="{LEFT}" y="{top}" width="{whole}" height="{ROW}" fill="#f1f1f1"/>"##
        ));
        let steps = plan.timeline.ranks[rank].steps.iter();
        for (step, &span) in steps.zip(&plan.simulation.spans[rank]) {
            if span.end > span.start {
                self.action(step.action, span, top);
            }
        }
    }

    fn action(&mut self, action: Action, span: Span, top: f64) {
        let name = action.to_string().replace('&', "&amp;");
        let (start, end) = (number(span.start), number(span.end));
        self.put(format_args!("<g><title>{name}: {start} to {end}</title>"));
        match action {
            Action::Overlapped { forward, backward } => {
                // Each has its share of the pair.
                let costs = self.plan.costs;
                let share = costs.forward / (costs.forward + costs.backward);
                let cut = span.start + share * (span.end - span.start);
                self.cell(FORWARD_KIND, forward, Span { end: cut, ..span }, top);
                self.cell(BACKWARD_KIND, backward, Span { start: cut, ..span }, top);
                // Inside, so that the next box leaves its right edge alone.
                let (x, y) = (px(self.x(span.start) + 1.0), top + 1.0);
                let (width, height) = (px(self.width(span) - 2.0), ROW - 2.0);
                self.put(format_args!(
                    r##"<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="#1c1c1c" stroke-width="1.6"/>"##
                ));
            }
            single => {
                if let Some(kind) = kind(single) {
                    self.cell(kind, single.chunk(), span, top);
                }
            }
        }
        self.put(format_args!("</g>"));
    }

    fn cell(&mut self, (_, colours): Kind, chunk: Chunk, span: Span, top: f64) {
        let (x, width) = (self.x(span.start), self.width(span));
        self.put(format_args!(
            r##"<rect x="{}" y="{top}" width="{}" height="{ROW}" fill="{}" stroke="#ffffff"/>"##,
            px(x),
            px(width),
            colours[chunk.direction.index()]
        ));
        let label = chunk.micro_batch.to_string();
        if label.len() as f64 * DIGIT <= width {
            let style = match chunk.direction {
                Direction::Ascending => "",
                Direction::Descending => r#" font-style="italic""#,
            };
            let (middle, baseline) = (px(x + width / 2.0), top + ROW / 2.0 + 4.0);
            self.put(format_args!(
                r##"<text x="{middle}" y="{baseline}" text-anchor="middle"{style}>{label}</text>"##
            ));
        }
    }

    /// Times in round steps, about 100 pixels apart.
    fn axis(&mut self, top: f64) {
        let rough = 100.0 / self.scale;
        let power = 10f64.powf(rough.log10().floor());
        let round = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
        let step = round.into_iter().find(|step| *step >= rough);
        let step = step.unwrap_or(rough);
        let ticks = (self.plan.simulation.makespan / step) as usize;
        for tick in 0..=ticks {
            let time = tick as f64 * step;
            let (x, label) = (px(self.x(time)), number(time));
            let (line, text) = (top + 5.0, top + 18.0);
            self.put(format_args!(
                r##"<path d="M{x} {top}V{line}" stroke="#8a8a8a"/><text x="{x}" y="{text}" text-anchor="middle" font-size="11" fill="#5a5a5a">{label}</text>"##
            ));
        }
        let y = top + 18.0;
        self.put(format_args!(
            r##"<text x="{}" y="{y}" text-anchor="end" font-size="11" fill="#5a5a5a">time</text>"##,
            LEFT - 8.0
        ));
    }

    fn legend(&mut self, top: f64) {
        let directions = self.plan.directions();
        let shades = if directions.is_some() { 2 } else { 1 };
        let mut x = LEFT;
        let text = top + 13.0;
        for (name, colours) in self.kinds() {
            for colour in &colours[..shades] {
                self.swatch(x, top, colour);
                x += 22.0;
            }
            self.put(format_args!(
                r##"<text x="{}" y="{text}">{name}</text>"##,
                x + 4.0
            ));
            x += 26.0 + name.len() as f64 * DIGIT;
        }
        if let Some([dark, light]) = directions {
            self.swatch(x, top, FORWARD_KIND.1[0]);
            self.swatch(x + 20.0, top, BACKWARD_KIND.1[1]);
            self.put(format_args!(
                r##"<rect x="{x}" y="{top}" width="40" height="18" fill="none" stroke="#1c1c1c" stroke-width="1.6"/><text x="{}" y="{text}">Overlapped forward &amp; backward</text>"##,
                x + 46.0
            ));
            let y = top + 38.0;
            self.put(format_args!(
                r##"<text x="{LEFT}" y="{y}">Dark: {dark}. Light, <tspan font-style="italic">italic</tspan>: {light}. Numbers are micro-batches.</text>"##
            ));
        }
    }

    /// Those that occur.
    fn kinds(&self) -> Vec<Kind> {
        let steps = self.plan.timeline.ranks.iter().flat_map(|rank| &rank.steps);
        let used: Vec<Kind> = steps
            .flat_map(|step| step.action.parts())
            .filter_map(kind)
            .collect();
        let kinds = [FORWARD_KIND, BACKWARD_KIND, INPUT_KIND, WEIGHT_KIND];
        kinds
            .into_iter()
            .filter(|kind| used.contains(kind))
            .collect()
    }

    fn swatch(&mut self, x: f64, y: f64, colour: &str) {
        self.put(format_args!(
            r##"<rect x="{x}" y="{y}" width="20" height="18" fill="{colour}"/>"##
        ));
    }

    fn x(&self, time: f64) -> f64 {
        LEFT + time * self.scale
    }

    fn width(&self, span: Span) -> f64 {
        (span.end - span.start) * self.scale
    }
}

/// The box of an action, unless it is a pair.
fn kind(action: Action) -> Option<Kind> {
    match action {
        Action::Forward(_) => Some(FORWARD_KIND),
        Action::Backward(_) => Some(BACKWARD_KIND),
        Action::BackwardInput(_) => Some(INPUT_KIND),
        Action::BackwardWeight(_) => Some(WEIGHT_KIND),
        Action::Overlapped { .. } => None,
    }
}

/// A hundredth of a pixel is close enough.
fn px(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
