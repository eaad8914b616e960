// Drawing: curves, bars of tiers, and the map of chunks.

const $ = (id) => document.getElementById(id);

/** An element with attributes and children; text is only ever text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const number = (value) => value >= 10_000 ? short.format(value) : Number(value.toPrecision(4)).toLocaleString("en");

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit ? value.toPrecision(value < 1000 ? 3 : 4) : value} ${units[unit]}`;
}

function duration(seconds) {
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds) % 60];
  if (h) return `${whole.format(h)} h ${m} min`;
  return m ? `${m} min ${s} s` : `${s} s`;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A canvas as sharp as the screen, cleared; `null` while it is not shown. */
function surface(canvas, height) {
  const width = canvas.clientWidth;
  if (!width) return null;
  if (height) canvas.style.height = `${height}px`;
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round((height ?? canvas.clientHeight) * scale)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, w, h);
  pen.font = "11px system-ui, sans-serif";
  return { pen, width, height: h / scale };
}

/** Round numbers between two others. */
function ticks(low, high, about) {
  const raw = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(value);
  return found;
}

/** A curve over steps: the mean of what falls on a pixel, and behind it everything between least and most. */
class Curve {
  constructor(canvas, readout, name, ink) {
    Object.assign(this, { canvas, readout, name, ink, cursor: null });
    this.clear();
    canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    canvas.addEventListener("pointerleave", () => this.look(null));
    canvas.addEventListener("blur", () => this.look(null));
    canvas.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by || !this.x.length) return;
      event.preventDefault();
      const at = this.cursor ?? this.x.length - 1;
      const stride = Math.max(1, Math.round(this.x.length / 100));
      this.look(Math.min(Math.max(at + by * stride, 0), this.x.length - 1));
    });
  }

  clear() {
    [this.x, this.y, this.cursor] = [[], [], null];
  }

  add(x, y) {
    if (!Number.isFinite(y)) return;
    this.x.push(x);
    this.y.push(y);
  }

  point(offset) {
    if (!this.x.length || !this.scale) return;
    const wanted = this.scale.step(offset);
    let [low, high] = [0, this.x.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.x[middle] < wanted) low = middle + 1;
      else high = middle;
    }
    this.look(low);
  }

  look(index) {
    this.cursor = index;
    this.draw();
  }

  draw() {
    const place = surface(this.canvas);
    if (!place) return;
    const { pen, width, height } = place;
    const [left, right, top, bottom] = [44, width - 8, 8, height - 20];
    pen.fillStyle = colour("dim");
    if (!this.x.length) {
      pen.fillText("no steps yet", left, height / 2);
      this.readout.value = "";
      return;
    }
    const [from, to] = [this.x[0], Math.max(this.x.at(-1), this.x[0] + 1)];
    let [low, high] = this.range();
    const X = (x) => left + (x - from) / (to - from) * (right - left);
    const Y = (y) => bottom - (y - low) / (high - low) * (bottom - top);
    this.scale = { step: (offset) => from + (offset - left) / (right - left) * (to - from) };
    this.grid(pen, { left, right, bottom, from, to, low, high, X, Y });
    this.line(pen, X, Y);
    this.mark(pen, X, Y, top, bottom);
  }

  /** Without the few wildest values: one spike would press all else to the ground. */
  range() {
    const sample = this.y.length > 4000 ? this.y.filter((_, index) => index % Math.ceil(this.y.length / 4000) === 0) : this.y;
    const sorted = Float64Array.from(sample).sort();
    const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
    const [low, high] = [at(0.003), at(0.997)];
    const pad = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    return [low - pad, high + pad];
  }

  grid(pen, { left, right, bottom, from, to, low, high, X, Y }) {
    pen.lineWidth = 1;
    pen.strokeStyle = colour("line");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const value of ticks(low, high, 4)) {
      const y = Math.round(Y(value)) + 0.5;
      pen.beginPath();
      pen.moveTo(left, y);
      pen.lineTo(right, y);
      pen.stroke();
      pen.fillText(number(value), left - 6, y);
    }
    pen.textBaseline = "alphabetic";
    for (const step of ticks(from, to, Math.max(3, (right - left) / 90))) {
      if (!Number.isInteger(step)) continue;
      pen.textAlign = X(step) > right - 16 ? "right" : "center";
      pen.fillText(short.format(step), X(step), bottom + 15);
    }
  }

  line(pen, X, Y) {
    const columns = new Map();
    for (let i = 0; i < this.x.length; i += 1) {
      const column = Math.round(X(this.x[i]));
      const seen = columns.get(column);
      const y = this.y[i];
      if (!seen) columns.set(column, { low: y, high: y, sum: y, count: 1 });
      else {
        seen.low = Math.min(seen.low, y);
        seen.high = Math.max(seen.high, y);
        seen.sum += y;
        seen.count += 1;
      }
    }
    const points = [...columns];
    pen.fillStyle = pen.strokeStyle = colour(this.ink);
    pen.globalAlpha = 0.18;
    pen.beginPath();
    for (const [x, seen] of points) pen.lineTo(x, Y(seen.high));
    for (const [x, seen] of points.reverse()) pen.lineTo(x, Y(seen.low));
    pen.fill();
    pen.globalAlpha = 1;
    pen.lineWidth = 1.8;
    pen.lineJoin = "round";
    // A step is noisy where there are many: the line is their running mean.
    const keep = Math.min(0.6, points.length / 400);
    let mean = null;
    pen.beginPath();
    for (const [x, seen] of points.reverse()) {
      const value = seen.sum / seen.count;
      mean = mean === null ? value : keep * mean + (1 - keep) * value;
      pen.lineTo(x, Y(mean));
    }
    pen.stroke();
  }

  mark(pen, X, Y, top, bottom) {
    const at = this.cursor ?? this.x.length - 1;
    const text = `step ${whole.format(this.x[at])}: ${number(this.y[at])}`;
    this.readout.value = text;
    this.canvas.setAttribute("aria-label", `${this.name} by step. At ${text}; at first ${number(this.y[0])}.`);
    if (this.cursor === null) return;
    pen.strokeStyle = colour("ink");
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(X(this.x[at]), top);
    pen.lineTo(X(this.x[at]), bottom);
    pen.stroke();
    pen.beginPath();
    pen.arc(X(this.x[at]), Y(this.y[at]), 3.5, 0, 7);
    pen.fillStyle = colour("ink");
    pen.fill();
  }
}

const LETTERS = { weight: "w", low: "l", master: "M", momentum: "m", variance: "v", gradient: "g" };
const BUSY = new Set(["compute"]);

/** How full the tiers are, by kind: the colour is the tier's, the letter the kind's. */
function drawTiers(box, map) {
  const rows = map.tiers.filter((tier) => tier.capacity_bytes || tier.used_bytes || tier.non_model_bytes).map((tier) => {
    const kinds = new Map();
    for (const chunk of map.chunks) {
      if (chunk.tier === tier.tier) kinds.set(chunk.kind, (kinds.get(chunk.kind) ?? 0) + chunk.bytes);
    }
    const parts = [...kinds].map(([kind, size]) => ({ name: kind, letter: LETTERS[kind] ?? "?", size, other: false }));
    const copies = tier.used_bytes - parts.reduce((sum, part) => sum + part.size, 0);
    if (copies > 0) parts.push({ name: "copies of what is nearer", letter: "c", size: copies, other: true });
    if (tier.non_model_bytes > 0) {
      parts.push({ name: "beside chunks", letter: "+", size: tier.non_model_bytes, other: true });
    }
    const total = Math.max(tier.capacity_bytes + tier.non_model_bytes, 1);
    const used = tier.used_bytes + tier.non_model_bytes;
    const said = parts.map((part) => `${part.letter} ${part.name} ${bytes(part.size)}`).join(" · ") || "empty";
    const bar = make("div", { class: `bar ${tier.tier}`, role: "img", "aria-label": `${tier.tier}: ${bytes(used)} of ${bytes(total)}. ${said}` });
    for (const part of parts) {
      const share = part.size / total;
      const piece = make("i", { class: part.other ? "other" : null, title: `${part.name} ${bytes(part.size)}` });
      piece.style.width = `${(100 * share).toFixed(2)}%`;
      if (share * (box.clientWidth - 90) > 14) piece.textContent = part.letter;
      bar.append(piece);
    }
    const text = `${bytes(used)} of ${bytes(total)}: ${said}`;
    return make("div", { class: "tier" }, make("b", {}, tier.tier), bar, make("span", { class: "said" }, text));
  });
  box.replaceChildren(...rows);
}

/** Every chunk: a band for each kind, in it a cell for each group. Its form and colour say where it is. */
class ChunkMap {
  constructor(canvas, readout) {
    Object.assign(this, { canvas, readout, map: null, before: new Map(), moved: new Set(), cells: [], chosen: null });
    canvas.addEventListener("pointermove", (event) => this.choose(this.under(event.offsetX, event.offsetY)));
    canvas.addEventListener("pointerleave", () => this.choose(null));
    canvas.addEventListener("blur", () => this.choose(null));
    canvas.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns }[event.key];
      if (!by || !this.cells.length) return;
      event.preventDefault();
      this.choose(Math.min(Math.max((this.chosen ?? -by) + by, 0), this.cells.length - 1));
    });
  }

  clear() {
    Object.assign(this, { map: null, cells: [], chosen: null });
    this.before.clear();
    this.moved.clear();
    this.readout.value = "";
    const place = surface(this.canvas, 24);
    if (place) {
      place.pen.fillStyle = colour("dim");
      place.pen.fillText("seen while the job runs", 0, 15);
    }
  }

  show(map) {
    this.moved.clear();
    for (const chunk of map.chunks) {
      // Gradients come and go; what counts is what was carried from one tier to another.
      const before = this.before.get(chunk.id);
      if (before && chunk.tier && before !== chunk.tier) this.moved.add(chunk.id);
      this.before.set(chunk.id, chunk.tier);
    }
    this.map = map;
    this.draw();
  }

  draw() {
    const { map, canvas } = this;
    if (!map || !canvas.clientWidth) return;
    const bands = Map.groupBy(map.chunks, (chunk) => chunk.kind);
    const gutter = 100;
    const room = canvas.clientWidth - gutter;
    const height = (size) => [...bands.values()].reduce(
      (sum, chunks) => sum + Math.ceil(chunks.length / Math.floor(room / size)) * size + 6, 0);
    let size = 28;
    while (size > 4 && height(size) > 340) size -= 1;
    this.columns = Math.floor(room / size);
    const place = surface(canvas, height(size));
    if (!place) return;
    const { pen } = place;
    const ink = Object.fromEntries(["device", "host", "disk", "none", "ink", "bad", "dim", "on-device", "on-host"].map((name) => [name, colour(name)]));
    this.cells = [];
    let top = 0;
    for (const [kind, chunks] of bands) {
      pen.fillStyle = ink.dim;
      pen.textAlign = "left";
      pen.textBaseline = "middle";
      pen.font = "12px system-ui, sans-serif";
      pen.fillText(`${LETTERS[kind] ?? "?"}  ${kind}`, 0, top + size / 2);
      chunks.forEach((chunk, index) => {
        const [x, y] = [gutter + index % this.columns * size, top + Math.floor(index / this.columns) * size];
        this.cells.push({ chunk, x, y, size });
        this.cell(pen, ink, chunk, x, y, size);
      });
      top += Math.ceil(chunks.length / this.columns) * size + 6;
    }
    this.describe();
  }

  cell(pen, ink, chunk, x, y, size) {
    const gap = size > 8 ? 2 : 1;
    const side = size - gap;
    pen.fillStyle = ink[chunk.tier ?? "none"];
    if (chunk.tier === "device") pen.fillRect(x, y, side, side);
    else if (chunk.tier === "disk") {
      pen.strokeStyle = ink.disk;
      pen.lineWidth = Math.max(1, side / 5);
      pen.strokeRect(x + pen.lineWidth / 2, y + pen.lineWidth / 2, side - pen.lineWidth, side - pen.lineWidth);
    } else {
      pen.beginPath();
      pen.arc(x + side / 2, y + side / 2, chunk.tier ? side / 2 : Math.max(1, side / 8), 0, 7);
      pen.fill();
    }
    if (size >= 16 && chunk.tier) {
      pen.fillStyle = chunk.tier === "disk" ? ink.ink : ink[`on-${chunk.tier}`];
      pen.textAlign = "center";
      pen.font = "600 11px system-ui, sans-serif";
      pen.fillText(LETTERS[chunk.kind] ?? "?", x + side / 2, y + side / 2 + 0.5);
    }
    const ring = (paint, inset, width) => {
      pen.strokeStyle = paint;
      pen.lineWidth = width;
      pen.strokeRect(x + inset, y + inset, side - 2 * inset, side - 2 * inset);
    };
    if (BUSY.has(chunk.state)) ring(ink.ink, 1, 2);
    if (this.moved.has(chunk.id)) this.flag(pen, ink, x + side, y, Math.max(3, side / 3));
    if (this.cells.length - 1 === this.chosen) ring(ink.ink, -0.5, 3);
  }

  flag(pen, ink, x, y, size) {
    pen.fillStyle = ink.bad;
    pen.beginPath();
    pen.moveTo(x - size, y);
    pen.lineTo(x, y);
    pen.lineTo(x, y + size);
    pen.fill();
  }

  under(x, y) {
    const index = this.cells.findIndex((cell) => x >= cell.x && x < cell.x + cell.size && y >= cell.y && y < cell.y + cell.size);
    return index < 0 ? null : index;
  }

  choose(index) {
    if (index === this.chosen) return;
    this.chosen = index;
    this.draw();
  }

  describe() {
    const places = Map.groupBy(this.map.chunks, (chunk) => chunk.tier ?? "nowhere");
    const counts = ["device", "host", "disk", "nowhere"].filter((place) => places.has(place))
      .map((place) => `${places.get(place).length} ${place === "nowhere" ? place : `on ${place}`}`).join(", ");
    this.canvas.setAttribute("aria-label", `Chunk map of step ${this.map.step}: ${this.map.chunks.length} chunks, ${counts}`);
    const cell = this.cells[this.chosen];
    this.readout.value = cell
      ? `chunk ${cell.chunk.id}: ${cell.chunk.kind} of group ${cell.chunk.group}, ${cell.chunk.tier ?? "nowhere"}, ${cell.chunk.state.replaceAll("_", " ")}`
      : `${this.map.chunks.length} chunks of ${bytes(this.map.chunks[0]?.bytes ?? 0)}: ${counts}`;
  }
}
