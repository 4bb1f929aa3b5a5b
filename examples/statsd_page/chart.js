// A line chart of the last two minutes in plain SVG. It knows nothing of metrics.
//
// A point is {time, NAME: number, ...}, with time in milliseconds. A line has a gap where a number is missing, or where
// no point arrived for a while. The value axis begins at zero, except with fromZero: false.

const WINDOW = 120_000;
const TOP = 24, RIGHT = 10, BOTTOM = 22;

const exact = new Intl.NumberFormat("en", { maximumFractionDigits: 3 });
const clock = new Intl.DateTimeFormat("en", { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

// A rate is a measurement, so it has about three digits. Other numbers are exact, to three decimals.
export const formatRate = (rate) => exact.format(Math.abs(rate) < 100 ? Number(rate.toPrecision(3)) : Math.round(rate));

export const format = (value) =>
  value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(2) : exact.format(value);

function svg(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Labels for the numbers of an axis: as short as possible, but all different.
function short(values) {
  for (let digits = 3; ; digits++) {
    const texts = values.map((value) => {
      const power = value === 0 ? 0 : Math.min(5, Math.max(0, Math.floor(Math.log10(Math.abs(value)) / 3)));
      return Number((value / 1000 ** power).toPrecision(digits)) + ["", "k", "M", "G", "T", "P"][power];
    });
    if (digits > 12 || new Set(texts).size === texts.length) return texts;
  }
}

// About five round values for an axis, which include `low` and `high`.
function ticks(low, high, leastStep) {
  if (low === high) high = low + (Math.abs(low) || 1);
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(leastStep, [1, 2, 5, 10].find((each) => each * power >= rough * 0.999) * power);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

export class Chart {
  // series: [{name, label, tone}]; unit: follows a number, as in "5 ms"; whole: values are integers;
  // steps: a value is valid until the next one.
  constructor(element, { label, unit, series, height = 156, fromZero = true, whole = false, steps = false }) {
    Object.assign(this, { element, unit, series, height, fromZero, leastStep: Number(whole), steps, points: [], now: 0, gap: Infinity, pointer: null });
    this.svg = svg("svg", { role: "img", height, "aria-label": label });
    element.append(this.svg);
    new ResizeObserver(() => this.draw()).observe(element);
    this.svg.addEventListener("pointermove", (event) => this.pointAt(event.clientX));
    this.svg.addEventListener("pointerdown", (event) => this.pointAt(event.clientX));
    this.svg.addEventListener("pointerleave", () => this.pointAt(null));
  }

  show(points, now, gap) {
    Object.assign(this, { points, now, gap });
    this.draw();
  }

  pointAt(x) {
    this.pointer = x;
    this.draw();
  }

  draw() {
    const width = this.element.clientWidth;
    if (!width || !this.points.length) return;
    const shown = this.points.filter((point) => point.time >= this.now - WINDOW);
    const values = shown.flatMap((point) => this.series.map(({ name }) => point[name])).filter(Number.isFinite);
    if (this.fromZero || !values.length) values.push(0);
    const marks = ticks(Math.min(...values), Math.max(...values), this.leastStep);
    const texts = short(marks);
    const left = 12 + 6.4 * Math.max(...texts.map((text) => text.length));
    const low = marks[0], high = marks[marks.length - 1];
    const x = (time) => left + (width - left - RIGHT) * (1 - (this.now - time) / WINDOW);
    const y = (value) => this.height - BOTTOM - ((this.height - TOP - BOTTOM) * (value - low)) / (high - low);

    this.svg.setAttribute("width", width);
    this.svg.replaceChildren(
      ...this.grid(marks, texts, left, width, y),
      ...this.series.flatMap((each) => this.line(each, shown, x, y)),
      ...this.readout(shown, left, width, x, y),
    );
  }

  grid(marks, texts, left, width, y) {
    const lines = marks.map((mark) =>
      svg("line", { class: mark === 0 ? "zero" : "grid", x1: left, x2: width - RIGHT, y1: y(mark), y2: y(mark) }));
    const numbers = marks.map((mark, i) => svg("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, texts[i]));
    const unit = svg("text", { class: "unit", x: 0, y: 11 }, this.unit);
    const labels = [["2 min ago", 0, "start"], ["1 min ago", 0.5, "middle"], ["now", 1, "end"]];
    if (width - left < 220) labels.splice(1, 1);
    const times = labels.map(([text, at, anchor]) =>
      svg("text", { x: left + (width - left - RIGHT) * at, y: this.height - 4, "text-anchor": anchor }, text));
    return [...lines, ...numbers, unit, ...times];
  }

  line({ name, tone }, points, x, y) {
    const runs = [];
    let before = null;
    for (const point of points) {
      if (!Number.isFinite(point[name])) {
        before = null;
        continue;
      }
      if (!before || point.time - before.time > this.gap) runs.push([]);
      runs.at(-1).push(point);
      before = point;
    }
    const place = (point) => `${x(point.time).toFixed(1)} ${y(point[name]).toFixed(1)}`;
    const path = runs.map((run) => `M${place(run[0])}` + run.slice(1).map((point) =>
      this.steps ? `H${x(point.time).toFixed(1)}V${y(point[name]).toFixed(1)}` : `L${place(point)}`).join("")).join("");
    // A run of one point has no line; a line of length zero with round caps is a dot.
    const dots = runs.filter((run) => run.length === 1).map((run) => `M${place(run[0])}h0`).join("");
    const last = runs.length && runs.at(-1).at(-1);
    return [
      svg("path", { class: `line ${tone}`, "data-series": name, d: path + dots }),
      ...(last && last === points.at(-1) ? [svg("circle", { class: tone, cx: x(last.time), cy: y(last[name]), r: 3 })] : []),
    ];
  }

  // Time and values of the point that is closest to the pointer.
  readout(points, left, width, x, y) {
    if (this.pointer === null || !points.length) return [];
    const pointer = this.pointer - this.svg.getBoundingClientRect().left;
    const distance = (point) => Math.abs(x(point.time) - pointer);
    const point = points.reduce((best, each) => (distance(each) < distance(best) ? each : best));
    const at = x(point.time);
    const rows = this.series.filter(({ name }) => Number.isFinite(point[name]));
    const number = this.unit.endsWith("/s") ? formatRate : format;
    const texts = [clock.format(point.time), ...rows.map(({ name, label }) =>
      `${this.series.length > 1 ? label + " " : ""}${number(point[name])} ${this.unit}`)];
    const boxWidth = 16 + 6.6 * Math.max(...texts.map((text) => text.length)), boxHeight = 10 + 16 * texts.length;
    const boxX = Math.max(0, Math.min(at + 10 + boxWidth > width ? at - 10 - boxWidth : at + 10, width - boxWidth));
    return [
      svg("line", { class: "pointer", x1: at, x2: at, y1: TOP, y2: this.height - BOTTOM }),
      ...rows.map(({ name, tone }) => svg("circle", { class: tone, cx: at, cy: y(point[name]), r: 4 })),
      svg("rect", { class: "box", x: boxX, y: TOP, width: boxWidth, height: boxHeight, rx: 6 }),
      ...texts.map((text, i) => svg("text", { class: "read", x: boxX + 8, y: TOP + 17 + 16 * i }, text)),
    ];
  }
}
