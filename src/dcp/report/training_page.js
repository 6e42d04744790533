// ---------------------------------------------------------------- the training page: curves over the steps, figures of the ranks
const steps = data.step, { series, last: now, evaluations } = data;
const lastStep = steps.length ? now.step : 0;
const keep = (() => { try { return JSON.parse(sessionStorage.getItem("dcp training")) || {}; } catch { return {}; } })();
const view = { part: keep.part || [0, 1], smooth: keep.smooth ?? (steps.length > 60 ? 0.8 : 0), log: keep.log || false, pointed: null };
if (keep.theme) document.documentElement.style.colorScheme = keep.theme;
const remember = () => {
  const state = { part: view.part, smooth: view.smooth, log: view.log, theme: document.documentElement.style.colorScheme };
  try { sessionStorage.setItem("dcp training", JSON.stringify(state)); } catch { /* a browser that keeps nothing */ }
};
const plain = x => x === null || x === undefined ? "–" : x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential(2) : x >= 1e5 ? count(Math.round(x)) : String(+x.toPrecision(4));
const share = x => x === null || x === undefined ? "–" : percent(x);
const duration = s => s >= 5400 ? `${(s / 3600).toFixed(1)} h` : s >= 90 ? `${(s / 60).toFixed(0)} min` : `${s.toFixed(0)} s`;
const column = name => series[name] ? series[name].mean : null;
const over = (one, two) => column(one) && column(two) ? { mean: column(one).map((x, i) => x === null || !column(two)[i] ? null : x / column(two)[i]) } : null;

// Curves of a chart: what they are called, values by step, colour; those without a value are left out.
const CHARTS = [
  { name: "loss", first: true, show: plain, curves: [["training", series.loss, "--accent"], ["evaluation", null, "--warm"]] },
  { name: "tokens a second", show: x => count(Math.round(x)), zero: true, curves: [["", series.tokens_per_second, "--accent"]] },
  { name: "balance, max ÷ mean", show: x => x.toFixed(3), least: 1, curves: [["compute", series.compute_balance, "--accent"], ["tokens", series.token_balance, "--warm"]] },
  { name: "waits", show: share, axis: x => Math.round(100 * x) + "%", zero: true, curves: [["plans, of the step", over("plan_wait_seconds", "seconds"), "--pink"],
    ["messages, of attention: mean", series.attention_wait_share, "--accent"], ["most", series.max_rank_attention_wait_share, "--warm"]] },
  { name: "attention, predicted ÷ measured", show: plain, line: 1, zero: true, curves: [["", series.predicted_over_measured, "--accent"]] },
  { name: "peak memory, fullest rank", show: bytes, zero: true, curves: [["", series.max_rank_memory_bytes, "--accent"]] },
  { name: "moved by attention, forward", show: bytes, zero: true, curves: [["inside nodes", series.intra_node_bytes, "--accent"], ["between nodes", series.inter_node_bytes, "--warm"]] },
  { name: "seconds of a step", show: seconds, zero: true, curves: [["", series.seconds, "--accent"]] },
  { name: "imbalance of groups", show: share, zero: true, curves: [["measured", series.measured_imbalance, "--accent"], ["predicted", series.predicted_imbalance, "--warm"]] },
  { name: "groups", show: plain, zero: true, curves: [["", series.num_groups, "--accent"]] },
  { name: "gradient norm", show: plain, zero: true, curves: [["", series.grad_norm, "--accent"]] },
  { name: "learning rate", show: plain, zero: true, curves: [["", series.learning_rate, "--accent"]] },
].map(of => ({ ...of, curves: of.curves.filter(([name, values]) => values || (name === "evaluation" && evaluations.step.length)) })).filter(of => of.curves.some(([, values]) => values));

function smoothed(values) {
  let held = null, weight = 0;
  return values.map(x => {
    if (x === null) return null;
    held = held === null ? x * (1 - view.smooth) : held * view.smooth + x * (1 - view.smooth);
    weight = weight * view.smooth + 1 - view.smooth;  // the first steps are not drawn towards 0
    return held / weight;
  });
}

// ---------------------------------------------------------------- heading
function heading() {
  const of = data.max_steps > 0 ? ` of ${count(data.max_steps)}` : "";
  document.title = `${lastStep}${of} · ${data.title}`;
  $("title").textContent = steps.length ? `${data.title}: step ${count(lastStep)}${of}` : `${data.title}: no step yet`;
  $("done").hidden = !of;
  $("done").firstElementChild.style.width = of ? `${100 * Math.min(lastStep / data.max_steps, 1)}%` : 0;
  $("done").ariaValueNow = of ? Math.round(100 * lastStep / data.max_steps) : 0;
  const left = of && data.recent_seconds && data.num_steps ? (data.max_steps - lastStep) * data.recent_seconds * data.num_steps / Math.max(lastStep, 1) : null;
  const waited = over("plan_wait_seconds", "seconds"), show = (value, as) => value === null || value === undefined ? "–" : as(value);
  const some = (name, as, label) => series[name] ? [[show(now[name], as), label]] : [];
  showFigures($("figures"), [
    [show(now.loss, x => x.toFixed(4)), "loss"],
    ...(evaluations.step.length ? [[show(evaluations.eval_loss.at(-1), x => x.toFixed(4)), `loss of evaluation at step ${count(evaluations.step.at(-1))}`]] : []),
    [show(data.recent_tokens_per_second, x => count(Math.round(x))), "tokens a second, median of 50 steps"],
    [data.tokens < 1e6 ? count(data.tokens) : short(data.tokens), "tokens trained on"],
    [duration(data.trained_seconds), left && data.reload_seconds ? `trained, ${duration(left)} to go` : "trained"],
    ...some("compute_balance", x => x.toFixed(3), "compute balance"),
    ...some("token_balance", x => x.toFixed(3), "token balance"),
    ...(waited ? [[share(waited.mean.at(-1)), "of the step waits for plans"]] : []),
    ...some("attention_wait_share", share, "of attention waits for messages"),
    ...some("predicted_over_measured", x => x.toFixed(2), "attention, predicted ÷ measured"),
    ...some("max_rank_memory_bytes", bytes, "memory of the fullest rank"),
    ...(now.strategy ? [[now.strategy, "strategy of the last plan"]] : []),
  ]);
}
function tellState() {
  const age = Math.max(Date.now() / 1000 - data.written, 0), box = $("state"), silent = age > Math.max(60, 10 * (data.recent_seconds || 0), 6 * (data.reload_seconds || 0));
  box.className = "state " + (!data.reload_seconds ? "over" : silent ? "silent" : "running");
  const when = new Date(data.written * 1000).toLocaleString();
  box.lastElementChild.textContent = !data.reload_seconds ? `finished, written ${when}` : silent ? `no news for ${duration(age)}: the job may have ended` : `running, written ${duration(age)} ago`;
}

// ---------------------------------------------------------------- curves
const HEIGHT = of => of.first ? 260 : 150, PAD = { left: 52, right: 10, top: 8, bottom: 20 };
function range(of, shown) {  // of the values in view
  let low = Infinity, high = -Infinity;
  const [from, to] = inView();
  for (const [name, values] of shown) {
    const xs = name === "evaluation" ? evaluations.step : steps;
    (values.low || values.mean).concat(values.high || []).forEach((x, i) => {
      const at = xs[i % xs.length];
      if (x !== null && at >= from && at <= to) { low = Math.min(low, x); high = Math.max(high, x); }
    });
  }
  if (low > high) return [0, 1];
  if (of.zero) low = Math.min(low, 0);
  if (of.least !== undefined) low = Math.min(low, of.least);
  if (of.line !== undefined) high = Math.max(high, of.line * 1.05);
  if (low === high) { low -= Math.abs(low) * 0.1 || 0.5; high += Math.abs(high) * 0.1 || 0.5; }
  return of.zero && low === 0 ? [0, high * 1.06] : [low - 0.04 * (high - low), high + 0.06 * (high - low)];
}
const first = steps[0] ?? 0, span = Math.max((steps.at(-1) ?? 1) - first, 1);
const inView = () => [first + view.part[0] * span, first + view.part[1] * span];
const nearest = step => { const i = last(steps, step); return i + 1 < steps.length && steps[i + 1] - step < step - steps[i] ? i + 1 : i; };

function makeChart(of) {
  const panel = element("div", undefined, { className: "panel" + (of.first ? " first" : "") }), title = element("h2", of.name), value = element("b");
  const keys = element("div", undefined, { className: "keys" }), canvas = element("canvas", undefined, { ariaLabel: `${of.name}; arrow keys walk through the steps` });
  canvas.setAttribute("role", "application");
  title.append(value);
  if (of.curves.length > 1) of.curves.forEach(([name, , colour], i) => {
    const key = element("span");
    key.append(element("i", undefined, { className: name === "evaluation" ? "dot" : i ? "dashed" : "", style: `color: var(${colour}); border-color: var(${colour})` }), name);
    keys.append(key);
  });
  panel.append(title, keys, canvas);
  Object.assign(of, { canvas, value });
  const x0 = PAD.left, wide = () => canvas.clientWidth - PAD.left - PAD.right;
  chart(canvas, {
    at(px) { const part = clamp((px - x0) / wide(), 0, 1); return steps.length ? nearest(inView()[0] + part * (inView()[1] - inView()[0])) : null; },
    text: i => words(i),
    first: () => steps.length ? steps.length - 1 : null,
    step: (i, right, down) => clamp(i + right + 10 * down, 0, steps.length - 1),
    place: i => [x0 + clamp((steps[i] - inView()[0]) / (inView()[1] - inView()[0]), 0, 1) * wide(), 30],
    point(i) { view.pointed = i; drawCharts(); },
    zoom(factor, px) { view.part = zoomed(view.part, factor, view.part[0] + clamp((px - x0) / wide(), 0, 1) * (view.part[1] - view.part[0])); remember(); drawCharts(); },
    pan(px) { view.part = moved(view.part, px / wide()); remember(); drawCharts(); },
    reset() { view.part = [0, 1]; remember(); drawCharts(); },
  });
  return panel;
}
function words(i) {
  const lines = [`step ${count(Math.round(steps[i]))}`];
  for (const of of CHARTS) for (const [name, values] of of.curves) {
    if (!values || values.mean[i] === null || name === "evaluation") continue;
    const between = values.low && values.low[i] !== values.high[i] ? `, ${of.show(values.low[i])} to ${of.show(values.high[i])}` : "";
    lines.push(`${of.name}${name ? ` (${name})` : ""}: ${of.show(values.mean[i])}${between}`);
  }
  return lines.join("\n");
}
function drawCharts() { for (const of of CHARTS) drawChart(of); }
function drawChart(of) {
  const width = room(of.canvas.parentElement), height = HEIGHT(of), pen = prepare(of.canvas, width, height);
  const curves = of.curves.map(([name, values, colour]) => [name, values || { mean: evaluations.eval_loss }, colour]);
  const log = of.first && view.log, scale = y => log ? Math.log10(Math.max(y, 1e-12)) : y, [from, to] = inView();
  let [low, high] = range(of, curves);
  if (log) [low, high] = [Math.max(low, high / 1e6), high].map(scale);
  const x = step => PAD.left + (step - from) / (to - from || 1) * (width - PAD.left - PAD.right), bottom = height - PAD.bottom;
  const y = v => bottom - (scale(v) - low) / (high - low || 1) * (bottom - PAD.top), i = view.pointed;
  pen.textAlign = "right";
  const levels = log ? ticks(10 ** low, 10 ** high, 5) : ticks(low, high, of.first ? 5 : 4);
  for (const level of levels) {
    pen.fillStyle = css("--line"); pen.fillRect(PAD.left, Math.round(y(level)), width - PAD.left - PAD.right, 1);
    pen.fillStyle = css("--soft"); pen.fillText((of.axis || short)(level), PAD.left - 7, y(level));
  }
  if (of.line !== undefined) { pen.fillStyle = css("--soft"); pen.fillRect(PAD.left, Math.round(y(of.line)), width - PAD.left - PAD.right, 1); }
  pen.textAlign = "center";
  pen.fillStyle = css("--soft");
  for (const at of ticks(from, to, Math.max(3, width / 110))) if (Number.isInteger(at)) pen.fillText(count(at), clamp(x(at), PAD.left + 8, width - 16), height - 8);
  pen.save();
  pen.beginPath(); pen.rect(PAD.left - 3, 0, width - PAD.left - PAD.right + 6, bottom + 3); pen.clip();
  curves.forEach(([name, values, colour], number) => {
    pen.strokeStyle = pen.fillStyle = css(colour);
    if (name === "evaluation") {
      evaluations.step.forEach((step, k) => { if (values.mean[k] !== null) { pen.beginPath(); pen.arc(x(step), y(values.mean[k]), 4, 0, 7); pen.fill(); } });
      return;
    }
    if (values.low) band(pen, values, x, y);
    const smooth = view.smooth > 0 && steps.length > 2;
    if (smooth) stroke(pen, values.mean, x, y, 1, 0.3, []);
    stroke(pen, smooth ? smoothed(values.mean) : values.mean, x, y, 2, 1, number ? [6, 4] : []);
    if (i !== null && values.mean[i] !== null) { pen.beginPath(); pen.arc(x(steps[i]), y(values.mean[i]), 3.5, 0, 7); pen.fill(); }
  });
  if (i !== null) { pen.fillStyle = css("--soft"); pen.fillRect(x(steps[i]) - 0.5, PAD.top, 1, bottom - PAD.top); }
  pen.restore();
  const shown = of.curves.filter(([name, values]) => values && name !== "evaluation").map(([, values]) => i === null ? values.mean.findLast(v => v !== null) : values.mean[i]);
  of.value.textContent = shown.map(v => v === null || v === undefined ? "–" : of.show(v)).join(" · ");
}
function short(x) {
  if (x === 0) return "0";
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (Math.abs(x) >= size) return +(x / size).toPrecision(3) + unit;
  return Math.abs(x) < 1e-3 ? x.toExponential(0) : String(+x.toPrecision(3));
}
function stroke(pen, values, x, y, width, alpha, dash) {
  pen.lineWidth = width; pen.globalAlpha = alpha; pen.lineJoin = "round";
  pen.setLineDash(dash);
  pen.beginPath();
  let open = false;
  values.forEach((v, k) => {
    if (v === null) { open = false; return; }
    open ? pen.lineTo(x(steps[k]), y(v)) : pen.moveTo(x(steps[k]), y(v));
    open = true;
  });
  pen.stroke();
  if (values.filter(v => v !== null).length === 1) { const k = values.findIndex(v => v !== null); pen.beginPath(); pen.arc(x(steps[k]), y(values[k]), 3, 0, 7); pen.fill(); }
  pen.globalAlpha = 1; pen.setLineDash([]);
}
function band(pen, values, x, y) {  // what the steps lie between that are drawn together
  pen.globalAlpha = 0.16;
  pen.beginPath();
  const there = steps.map((_, k) => k).filter(k => values.low[k] !== null);
  there.forEach(k => pen.lineTo(x(steps[k]), y(values.high[k])));
  there.toReversed().forEach(k => pen.lineTo(x(steps[k]), y(values.low[k])));
  pen.fill();
  pen.globalAlpha = 1;
}

// ---------------------------------------------------------------- every rank
const BARS = [["memory_bytes", "peak memory", bytes], ["plan_wait_seconds", "waits for a plan", seconds], ["attention_wait_share", "waits for messages", share]]
  .filter(([name]) => data.ranks[name] && data.ranks[name].some(x => x !== null)).map(([name, title, show]) => ({ name, title, show, values: data.ranks[name], pointed: null }));
function makeBars(of) {
  const panel = element("div", undefined, { className: "panel" }), title = element("h2", of.title);
  of.canvas = element("canvas", undefined, { ariaLabel: `${of.title} of every rank; arrow keys walk` });
  of.canvas.setAttribute("role", "application");
  of.value = element("b");
  title.append(of.value);
  panel.append(title, of.canvas);
  const n = of.values.length, wide = () => of.canvas.clientWidth - PAD.left;
  chart(of.canvas, {
    at: px => px < PAD.left ? null : clamp(Math.floor((px - PAD.left) / wide() * n), 0, n - 1),
    text: rank => `rank ${rank}: ${of.values[rank] === null ? "–" : of.show(of.values[rank])}`,
    first: () => 0, step: (rank, right, down) => clamp(rank + right + down, 0, n - 1),
    place: rank => [PAD.left + (rank + 0.5) / n * wide(), 40],
    point(rank) { of.pointed = rank; drawBars(of); },
  });
  return panel;
}
function drawBars(of) {
  const width = room(of.canvas.parentElement), height = 130, pen = prepare(of.canvas, width, height), n = of.values.length, bottom = height - PAD.bottom;
  const most = Math.max(...of.values, 1e-12), each = (width - PAD.left) / n, top = most * 1.08;
  pen.textAlign = "right";
  for (const level of ticks(0, top, 3)) {
    const y = bottom - level / top * (bottom - PAD.top);
    pen.fillStyle = css("--line"); pen.fillRect(PAD.left, Math.round(y), width - PAD.left, 1);
    pen.fillStyle = css("--soft"); pen.fillText(of.name === "attention_wait_share" ? Math.round(100 * level) + "%" : of.name === "plan_wait_seconds" ? (level < 1 ? short(1e3 * level) + " ms" : level + " s") : short(level), PAD.left - 7, y);
  }
  pen.textAlign = "center";
  of.values.forEach((value, rank) => {
    const tall = (value || 0) / top * (bottom - PAD.top);
    pen.fillStyle = css(rank === of.pointed ? "--warm" : "--accent");
    pen.fillRect(PAD.left + rank * each + (each > 4 ? each * 0.12 : 0), bottom - tall, each > 4 ? Math.min(each * 0.76, 60) : Math.max(each - 0.4, 0.5), tall);
  });
  pen.fillStyle = css("--soft");
  for (let rank = 0; rank < n; rank += Math.ceil(26 / each)) pen.fillText(String(rank), PAD.left + rank * each + Math.min(each / 2, 36), height - 8);
  of.value.textContent = `most ${of.show(most)}, rank ${of.values.indexOf(Math.max(...of.values))}`;
}

// ---------------------------------------------------------------- together
function draw() { heading(); drawCharts(); BARS.forEach(drawBars); }
$("charts").append(...CHARTS.map(makeChart));
$("bars").append(...BARS.map(makeBars));
$("ranks").hidden = !BARS.length;
if (BARS.length) $("ranks-say").textContent = `As of step ${count(lastStep)}, rank by rank.`;
$("smooth").value = view.smooth;
$("log").checked = view.log;
$("smooth").oninput = event => { view.smooth = Number(event.target.value); remember(); drawCharts(); };
$("log").onchange = event => { view.log = event.target.checked; remember(); drawCharts(); };
const whole = { zoom: factor => { view.part = zoomed(view.part, factor, view.part[1]); remember(); drawCharts(); }, reset() { view.part = [0, 1]; remember(); drawCharts(); } };
zoomButtons($("zoom"), whole, () => []);
themeButton($("theme"), () => { remember(); draw(); });
draw();
tellState();
if (data.reload_seconds) {
  setInterval(tellState, 1000);
  // a page that is read or typed at stays as it is until that ends
  setInterval(() => { if (!document.hidden && view.pointed === null && !printing) location.reload(); }, 1000 * data.reload_seconds);
}
