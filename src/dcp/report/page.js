"use strict";
// What every page of dcp needs: numbers as words, colours of the theme, a canvas to draw on, charts that mouse and keys can walk.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const sum = list => list.reduce((a, b) => a + b, 0);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const count = n => n.toLocaleString("en-US");
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
function bytes(n) {
  for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
    if (n < 999.95 || unit === "TB") return (n >= 99.95 || unit === "B" ? n.toFixed(0) : n.toFixed(1)) + " " + unit;
    n /= 1000;
  }
}
function seconds(s) {
  if (!s) return "0 s";
  if (s >= 1) return s.toFixed(2) + " s";
  return s >= 1e-3 ? (s * 1e3).toFixed(s < 0.1 ? 2 : 0) + " ms" : (s * 1e6).toFixed(s < 1e-5 ? 1 : 0) + " µs";
}
const percent = part => (100 * part).toFixed(part < 0.0995 ? 1 : 0) + "%";
// Index of the last of ascending `starts` that is not beyond `value`.
function last(starts, value) {
  let low = 0, high = starts.length;
  while (high - low > 1) { const middle = (low + high) >> 1; starts[middle] <= value ? low = middle : high = middle; }
  return low;
}
// Round numbers from low to high, about `wanted` of them.
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted || 1, power = Math.pow(10, Math.floor(Math.log10(raw)));
  const step = [1, 2, 5, 10].map(m => m * power).find(t => t >= raw * 0.999), found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}
function element(name, text, more = {}) {
  const made = Object.assign(document.createElement(name), more);
  if (text !== undefined) made.textContent = text;
  return made;
}
function showFigures(box, figures) {
  const cells = figures.map(([value, label]) => {
    const cell = element("div");
    cell.append(element("b", value), element("span", label));
    return cell;
  });
  box.replaceChildren(...cells);
  const across = getComputedStyle(box).gridTemplateColumns.split(" ").length, over = cells.length % across;
  if (over) box.append(element("div", "", { className: "rest", style: `grid-column: span ${across - over}` }));
}

// ---------------------------------------------------------------- theme
const probe = element("i"), isDark = matchMedia("(prefers-color-scheme: dark)");
probe.hidden = true;
document.body.append(probe);
let printing = false;
const dark = () => !printing && (document.documentElement.style.colorScheme || (isDark.matches ? "dark" : "light")) === "dark";
function css(name) { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; }
function themeButton(button, redraw) {
  button.onclick = () => { document.documentElement.style.colorScheme = dark() ? "light" : "dark"; redraw(); };
  isDark.addEventListener("change", redraw);
  let chosen = "";
  addEventListener("beforeprint", () => {
    chosen = document.documentElement.style.colorScheme;
    document.documentElement.style.colorScheme = "light";
    printing = true; redraw();
  });
  addEventListener("afterprint", () => { printing = false; document.documentElement.style.colorScheme = chosen; redraw(); });
  let resized;
  addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(redraw, 120); });
}

// ---------------------------------------------------------------- canvas and charts
const FONT = "12px system-ui, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', sans-serif";
function prepare(canvas, width, height) {
  const ratio = printing ? 2 : devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = FONT;
  pen.textBaseline = "middle";
  return pen;
}
function room(box) {
  const style = getComputedStyle(box);
  return Math.floor(box.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight));
}
const tip = {
  show(text, x, y) {
    const box = $("tip");
    box.textContent = text;
    box.style.display = "block";
    box.style.left = clamp(x + 14, 8, Math.max(innerWidth - box.offsetWidth - 8, 8)) + "px";
    box.style.top = (y + 16 + box.offsetHeight > innerHeight - 8 ? Math.max(y - box.offsetHeight - 12, 8) : y + 16) + "px";
  },
  hide() { $("tip").style.display = "none"; },
};
// A part [from, to] of [0, 1] made `factor` times smaller around `at`, or moved by `by` of its width.
const zoomed = ([from, to], factor, at) => {
  const width = clamp((to - from) / factor, 1e-4, 1), begin = clamp(at - (at - from) / (to - from) * width, 0, 1 - width);
  return [begin, begin + width];
};
const moved = ([from, to], by) => { const begin = clamp(from + by * (to - from), 0, 1 - (to - from)); return [begin, begin + to - from]; };

/* A canvas that can be pointed at, walked with arrows, picked from, and zoomed.
   of.at(x, y): what is there, or null; of.text(what): in words; of.place(what): where; of.step(what, right, down): its neighbour;
   of.pick(what); of.point(what): show that it is pointed at; of.zoom(factor, x, y), of.pan(x, y) in pixels, of.reset(). */
function chart(canvas, of) {
  let current = null, drag = null, walked = 0;
  addEventListener("scroll", () => { if (performance.now() - walked > 300) tip.hide(); }, { passive: true });
  canvas.tabIndex = 0;
  const point = (what, x, y) => {
    current = what;
    if (of.point) of.point(what);
    if (what === null) return tip.hide();
    tip.show(of.text(what), x, y);
  };
  const walk = what => {
    if (what === null) return;
    current = what;
    if (of.point) of.point(what);
    const [x, y] = of.place(what), top = canvas.getBoundingClientRect().top + y;
    if (top < 100 || top > innerHeight - 60) { walked = performance.now(); scrollBy(0, top - innerHeight / 2); }
    const box = canvas.getBoundingClientRect();
    tip.show(of.text(what), box.left + x, box.top + y);
    $("said").textContent = of.text(what);
  };
  const within = event => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.onpointermove = event => {
    const [x, y] = within(event);
    if (drag && of.pan && (drag.far || Math.hypot(x - drag.x, y - drag.y) > 4)) {
      of.pan(drag.x - x, drag.y - y);
      drag = { x, y, far: true };
      return tip.hide();
    }
    point(of.at(x, y), event.clientX, event.clientY);
  };
  canvas.onpointerdown = event => {
    const [x, y] = within(event);
    drag = { x, y, far: false };
    if (event.pointerType === "mouse") canvas.setPointerCapture(event.pointerId);
    point(of.at(x, y), event.clientX, event.clientY);
  };
  canvas.onpointerup = event => {
    if (drag && !drag.far && of.pick) { const what = of.at(...within(event)); if (what !== null) of.pick(what); }
    drag = null;
  };
  canvas.onpointercancel = () => { drag = null; };
  canvas.onpointerleave = event => { if (event.pointerType === "mouse" && !drag) point(null); };
  canvas.onblur = () => point(null);
  if (of.zoom) {
    canvas.ondblclick = event => of.zoom(2, ...within(event));
    canvas.addEventListener("wheel", event => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      of.zoom(Math.exp(-event.deltaY / 250), ...within(event));
    }, { passive: false });
  }
  canvas.onkeydown = event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }, [x, y] = current === null ? [0, 0] : of.place(current);
    if (steps[event.key]) walk(current === null ? of.first() : of.step(current, ...steps[event.key]));
    else if ((event.key === "Enter" || event.key === " ") && of.pick && current !== null) of.pick(current);
    else if ((event.key === "+" || event.key === "=") && of.zoom) of.zoom(1.6, x, y);
    else if (event.key === "-" && of.zoom) of.zoom(1 / 1.6, x, y);
    else if (event.key === "0" && of.reset) of.reset();
    else return;
    event.preventDefault();
    if (current !== null && !steps[event.key] && of.zoom) walk(current);
  };
  return of;
}
function zoomButtons(box, of, middle) {
  const make = (text, label, act) => element("button", text, { title: label, ariaLabel: label, onclick: act });
  box.append(make("+", "zoom in", () => of.zoom(1.6, ...middle())), make("−", "zoom out", () => of.zoom(1 / 1.6, ...middle())),
    make("all", "show all of it", () => of.reset()));
}
