// The live page: it reads /events, and keeps and shows the last two minutes. chart.js draws the charts.

import { Chart, format, formatRate } from "./chart.js";

const WINDOW = 120_000; // milliseconds
const MAX_CARDS = 60; // the filter finds the others
const moment = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short", hourCycle: "h23" });
const $ = (selector, element = document) => element.querySelector(selector);

const DISTRIBUTION = {
  figure: "p95",
  rows: (last) => [
    ["p50", format(last.p50), "teal-1"], ["p95", format(last.p95), "teal-2"], ["p99", format(last.p99), "teal-3"],
    ["Min", format(last.min)], ["Mean", format(last.mean)], ["Max", format(last.max)],
    ["Count", format(last.count)], ["Rate", `${formatRate(last.rate)} /s`],
  ],
  series: [
    { name: "p50", label: "p50", tone: "teal-1" },
    { name: "p95", label: "p95", tone: "teal-2" },
    { name: "p99", label: "p99", tone: "teal-3" },
  ],
};

// How each kind of metric is shown: the large figure, the small figures below it, and the lines of its chart.
const KINDS = {
  counter: {
    unit: "/s",
    figure: "rate",
    rows: (last) => [["Last interval", format(last.count)], ["Since start", format(last.total)]],
    series: [{ name: "rate", label: "rate", tone: "blue" }],
  },
  gauge: {
    unit: "",
    figure: "value",
    rows: (last, points) => {
      const values = points.map((point) => point.value);
      return [["Min", format(Math.min(...values))], ["Max", format(Math.max(...values))]];
    },
    series: [{ name: "value", label: "value", tone: "violet" }],
    steps: true,
    fromZero: false,
  },
  timer: { unit: "ms", ...DISTRIBUTION },
  histogram: { unit: "", ...DISTRIBUTION },
  set: {
    unit: "unique",
    whole: true,
    figure: "unique",
    rows: (last, points) => [["Max", format(Math.max(...points.map((point) => point.unique)))]],
    series: [{ name: "unique", label: "unique", tone: "amber" }],
  },
};

const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);

// The server's own charts. A chart shows the increase of `counts` per second, and the values of `levels`.
const SERVER = [
  {
    title: "Datagrams", unit: "/s",
    counts: { received: (event) => event.server.received },
    series: [{ name: "received", label: "received", tone: "blue" }],
    rows: ({ server }) => [["Received", format(server.received)], ["Handled", format(server.delivered)]],
  },
  {
    title: "Payload", unit: "B/s",
    counts: { bytes: (event) => event.server.bytes_received },
    series: [{ name: "bytes", label: "payload", tone: "blue" }],
    rows: ({ server }) => [["Received", `${format(server.bytes_received)} B`]],
  },
  {
    title: "Lines", unit: "/s",
    counts: {
      accepted: ({ lines }) => lines.accepted,
      malformed: ({ lines }) => lines.malformed,
      refused: ({ lines }) => lines.refused_names + lines.refused_values,
    },
    series: [
      { name: "accepted", label: "accepted", tone: "blue" },
      { name: "malformed", label: "malformed", tone: "red" },
      { name: "refused", label: "refused", tone: "amber" },
    ],
    rows: ({ lines }) => [
      ["Accepted", format(lines.accepted), "blue"],
      ["Malformed", format(lines.malformed), "red"],
      ["Refused", format(lines.refused_names + lines.refused_values), "amber"],
    ],
  },
  {
    title: "Lost datagrams", unit: "/s",
    counts: {
      kernel: ({ server }) => server.kernel_dropped,
      server: ({ server }) => sum(server.lost) - server.kernel_dropped,
    },
    figure: ["kernel", "server"],
    series: [
      { name: "kernel", label: "kernel", tone: "red" },
      { name: "server", label: "server", tone: "amber" },
    ],
    rows: ({ server }) => {
      const reasons = Object.entries(server.lost).filter(([name, count]) => count && name !== "kernel_dropped");
      return [
        ["By the kernel", format(server.kernel_dropped), "red"],
        ["By the server", format(sum(server.lost) - server.kernel_dropped), "amber"],
        ...reasons.map(([name, count]) => [name, format(count)]),
      ];
    },
  },
  {
    title: "Senders", unit: "addresses", whole: true,
    levels: { senders: (event) => event.senders },
    series: [{ name: "senders", label: "senders", tone: "violet" }],
    rows: (event, points) => [
      ["Max", format(Math.max(...points.map((point) => point.senders)))],
      ["Clients kept", format(event.server.clients)],
    ],
  },
  {
    title: "Metrics", unit: "names", whole: true,
    levels: { names: (event) => event.names },
    series: [{ name: "names", label: "names", tone: "violet" }],
    rows: ({ most_names, lines }) => [
      ["Room for", format(most_names)],
      ["New names refused", format(lines.refused_names)],
      ["Values refused", format(lines.refused_values)],
    ],
  },
];

// A card: a name, a large figure, small figures, and a chart.
class Card {
  constructor(title, kind, { unit, ...options }) {
    this.element = $("#card").content.firstElementChild.cloneNode(true);
    this.unit = unit;
    $("h3", this.element).textContent = title;
    $(".kind", this.element).textContent = kind;
    $(".kind", this.element).classList.add(kind || "none");
    $(".unit", this.element).textContent = unit;
    this.chart = new Chart($(".chart", this.element), { label: `${title}, ${unit || "value"}, last two minutes`, unit, ...options });
  }

  show(figure, rows, points, event, age = 0) {
    const value = $("b", this.element);
    value.textContent = figure === undefined ? "–" : this.unit.endsWith("/s") ? formatRate(figure) : format(figure);
    value.classList.toggle("long", value.textContent.length > 9);
    $(".unit", this.element).textContent = age > 0 ? `${this.unit}, ${age} s ago` : this.unit;
    this.element.classList.toggle("old", age > 0);
    $("dl", this.element).replaceChildren(...rows.map(([term, description, tone]) => {
      const row = document.createElement("div");
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = term;
      dd.textContent = description;
      if (tone) row.className = tone;
      row.append(dt, dd);
      return row;
    }));
    this.chart.show(points, event.time, event.seconds * 2500);
  }
}

// `event` is the last one; `metrics` has the points of each metric by kind and name, in the order of the server.
let event = null;
let arrived = 0; // when it arrived, in milliseconds
let metrics = new Map();
const server = SERVER.map((view) => ({ view, points: [], card: null }));
const choice = { kind: "", text: "" };

const keep = (points, point) => [...points.filter((each) => each.time > point.time - WINDOW), point];

function take(next) {
  const before = event && event.begun === next.begun ? event : null;
  event = next;
  for (const item of server) {
    const { counts = {}, levels = {} } = item.view;
    const point = { time: next.time };
    for (const [name, of] of Object.entries(levels)) point[name] = of(next);
    if (before) for (const [name, of] of Object.entries(counts)) point[name] = (of(next) - of(before)) / next.seconds;
    item.points = keep(item.points, point);
  }
  const known = metrics;
  metrics = new Map();
  for (const [kind, named] of Object.entries(next.metrics)) {
    for (const [name, figures] of Object.entries(named)) {
      const key = `${kind}:${name}`;
      const metric = known.get(key) ?? { kind, name, points: [], card: null };
      metric.points = keep(metric.points, { time: next.time, ...figures });
      metrics.set(key, metric);
    }
  }
}

function showServer() {
  for (const item of server) {
    const { view, points } = item;
    if (!item.card) {
      item.card = new Card(view.title, "", { ...view, height: 124 });
      $("#server").append(item.card.element);
    }
    const last = points.at(-1);
    const names = view.figure ?? [view.series[0].name];
    const figure = names.every((name) => name in last) ? names.reduce((total, name) => total + last[name], 0) : undefined;
    item.card.element.classList.toggle("alarm", view.title === "Lost datagrams" && figure > 0);
    item.card.show(figure, view.rows(event, points), points, event);
  }
}

function showFacts() {
  $("#address").textContent = `udp ${event.addresses.join(", ")}`;
  $("#port").textContent = event.addresses[0].split(":").at(-1);
  $("#since").textContent = `since ${moment.format(event.begun)}`;
  $("#interval").textContent = format(event.interval);
  $("#malformed").hidden = !event.lines.last_malformed;
  $("#malformed code").textContent = event.lines.last_malformed;
}

function showMetrics() {
  const text = choice.text.trim().toLowerCase();
  const found = [...metrics.values()].filter(({ kind, name }) =>
    (!choice.kind || kind === choice.kind) && name.toLowerCase().includes(text));
  const shown = found.slice(0, MAX_CARDS);
  for (const metric of shown) {
    const view = KINDS[metric.kind];
    if (!metric.card) {
      metric.card = new Card(metric.name, metric.kind, view);
      metric.card.element.dataset.metric = `${metric.kind}:${metric.name}`;
    }
    // A timer without values in an interval has no figures: show the last ones, and their age.
    const last = metric.points.findLast((point) => view.figure in point) ?? metric.points.at(-1);
    const rows = view.figure in last ? view.rows(last, metric.points) : [];
    metric.card.show(last[view.figure], rows, metric.points, event, Math.round((event.time - last.time) / 1000));
  }
  const elements = shown.map((metric) => metric.card.element);
  const present = $("#metrics").children;
  if (elements.length !== present.length || elements.some((element, i) => element !== present[i])) {
    $("#metrics").replaceChildren(...elements);
  }
  $("#more").hidden = found.length === shown.length;
  $("#more").textContent = `${format(found.length - shown.length)} more: filter by name to see them.`;
  $("#empty").hidden = metrics.size > 0;
  $("#none").hidden = metrics.size === 0 || found.length > 0;
  for (const button of $("#kinds").children) {
    const { kind } = button.dataset;
    const count = kind ? Object.keys(event.metrics[kind]).length : metrics.size;
    $("span", button).textContent = count;
    button.hidden = kind !== choice.kind && count === 0;
    button.setAttribute("aria-pressed", kind === choice.kind);
  }
}

let isDue = false;
function showSoon() {
  if (isDue || !event) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    showFacts();
    showServer();
    showMetrics();
  });
}

function tell(state, text) {
  $("#status").className = state;
  $("#status").textContent = text;
}

// A server that hangs keeps the connection open.
function noticeSilence() {
  const silence = performance.now() - arrived;
  if (event && $("#status").className !== "lost" && silence > Math.max(2000, event.interval * 3000)) {
    tell("silent", `No data for ${Math.round(silence / 1000)} s`);
  }
}

function follow() {
  const source = new EventSource("events");
  source.onopen = () => tell("live", "Live");
  source.onmessage = (message) => {
    take(JSON.parse(message.data));
    arrived = performance.now();
    tell("live", "Live");
    showSoon();
  };
  source.onerror = () => {
    tell("lost", "Server is away, trying again…");
    if (source.readyState === EventSource.CLOSED) setTimeout(follow, 2000); // another program answers on this port
  };
}

$("#filter").addEventListener("input", ({ target }) => {
  choice.text = target.value;
  showSoon();
});
$("#kinds").addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (button) choice.kind = button.dataset.kind;
  showSoon();
});
setInterval(noticeSilence, 1000);
follow();
