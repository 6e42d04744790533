// ---------------------------------------------------------------- the plan page: what is shown, heading, controls, one rank in words
const { blocks, stats, cluster, seqlens } = data;
const node = cluster.node_of_rank, numRanks = node.length, numNodes = node[numRanks - 1] + 1;
const nodeSize = Array(numNodes).fill(0), device = node.map(n => nodeSize[n]++);
const view = { mask: Object.keys(data.masks)[0], group: 0, colour: "rank", pass: "forward", rank: null, sequence: null, time: [0, 1], x: [0, 1], y: [0, 1] };
const BUFFERS = { forward: ["queries", "keys and values", "outputs", ""], backward: ["queries and output gradients", "keys and values", "query gradients", "key and value gradients"] };
const mask = () => data.masks[view.mask];

// Nodes differ in hue, their devices in lightness; the devices of one node take the hues. What looks alike to the colour-blind
// (green and pink, orange and olive) differs in lightness: hue, chroma, darkest, lightest.
const HUES = [[250, 0.14, 0.42, 0.8], [58, 0.15, 0.5, 0.84], [165, 0.1, 0.33, 0.6], [345, 0.12, 0.66, 0.88],
  [105, 0.13, 0.74, 0.94], [300, 0.14, 0.3, 0.56], [30, 0.17, 0.38, 0.66], [215, 0.09, 0.6, 0.9]];
function rankColour(rank) {
  const many = numNodes > 1, [hue, chroma, low, high] = HUES[(many ? node[rank] : device[rank]) % HUES.length];
  const at = many && nodeSize[node[rank]] > 1 ? device[rank] / (nodeSize[node[rank]] - 1) : 0.5;
  return `oklch(${(low + (high - low) * at + (dark() ? 0.04 : 0)).toFixed(3)} ${(chroma * (1 - 0.3 * Math.abs(2 * at - 1))).toFixed(3)} ${hue})`;
}
// From dark blue over grey to yellow, as in cividis: every kind of eye sees the order.
const CIVIDIS = ["#00306f", "#404c6b", "#6b6c70", "#9a8f74", "#cdb468", "#fee338"];
function divisionColour(division, total) {
  const at = total > 1 ? division / (total - 1) * (CIVIDIS.length - 1) : 0, low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  const part = i => [0, 1].map(k => parseInt(CIVIDIS[low + k].slice(1 + 2 * i, 3 + 2 * i), 16));
  const lift = dark() ? 26 : 0, mixed = [0, 1, 2].map(part).map(([a, b]) => Math.min(a + (b - a) * (at - low) + lift, 255).toFixed(0));
  return `rgb(${mixed.join(" ")})`;
}
function inkOn(colour) {  // black or white, whichever is read better
  const [, l] = colour.match(/^oklch\(([\d.]+)/) || [], rgb = l ? null : colour.match(/\d+/g).map(Number);
  return (l ? Number(l) : (0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]) / 255) > 0.62 ? "#101114" : "#ffffff";
}
const dimmed = rank => view.rank !== null && view.rank !== rank;
const tokenRange = block => `${count(blocks.position[block])}–${count(blocks.position[block] + blocks.length[block] - 1)}`;

// ---------------------------------------------------------------- what travels
/* Flows of the mask and pass that are shown: bytes by communication, sender, receiver and kind. */
const flowsMade = new Map();
function flows() {
  const key = `${view.pass} ${view.mask}`;
  if (!flowsMade.has(key)) {
    const { step, source, target, buffer } = mask().moves, size = mask().moves[view.pass], found = new Map();
    size.forEach((n, i) => {
      if (!n) return;
      const name = [step[i], source[i], target[i]].join();
      if (!found.has(name)) found.set(name, { step: step[i], source: source[i], target: target[i], bytes: 0, kinds: {} });
      const flow = found.get(name), kind = BUFFERS[view.pass][buffer[i]];
      flow.bytes += n;
      flow.kinds[kind] = (flow.kinds[kind] || 0) + n;
    });
    flowsMade.set(key, [...found.values()]);
  }
  return flowsMade.get(key);
}
const flowsOf = (rank, step) => {
  const all = flows().filter(f => f.step === step);
  return { sent: all.filter(f => f.source === rank), got: all.filter(f => f.target === rank) };
};
function received() {  // of each rank, from its own node and from others
  const from = [Array(numRanks).fill(0), Array(numRanks).fill(0)];
  for (const f of flows()) from[Number(node[f.source] !== node[f.target])][f.target] += f.bytes;
  return from;
}
const kinds = flow => Object.entries(flow.kinds).map(([kind, n]) => `${bytes(n)} of ${kind}`).join(", ");

// ---------------------------------------------------------------- heading
function heading() {
  const s = data.spec, masks = Object.keys(data.masks);
  document.title = data.title;
  $("title").textContent = `${data.title}: ${count(stats.num_tokens)} tokens on ${plural(numRanks, "rank")}`;
  $("subtitle").textContent = `${stats.strategy} · ${plural(seqlens.length, "document")} · ${plural(numNodes, "node")} of ${cluster.name} · `
    + `${s.num_heads} query heads and ${s.num_kv_heads} KV heads of ${s.head_dim} in ${s.dtype}` + (masks.length > 1 ? ` · masks ${masks.join(", ")}` : "");
  const sim = stats.simulated || {}, known = n => n === undefined ? "–" : seconds(n);
  showFigures($("figures"), [
    [known(sim.forward_seconds), "attention forward, predicted"],
    [known(sim.backward_seconds), "attention backward, predicted"],
    [known(sim.exposed_comm_seconds), "of forward is waiting"],
    [stats.compute_balance.toFixed(3), "compute balance, max ÷ mean"],
    [stats.token_balance.toFixed(3), "token balance, max ÷ mean"],
    [bytes(stats.inter_node_bytes), "between nodes, forward"],
    [bytes(stats.intra_node_bytes), "inside nodes, forward"],
    [bytes(stats.max_rank_recv_bytes), "busiest receiver, forward"],
    [bytes(stats.max_rank_buffer_bytes), "fullest rank's buffers"],
    [count(stats.num_compute_blocks), `compute blocks of ≤ ${count(stats.block_size)} tokens`],
    [count(stats.num_divisions), "divisions"],
    [seconds(stats.planning_seconds), "to plan"],
  ]);
  if (stats.limit_seconds) layerBar();
}
function layerBar() {
  const limit = stats.limit_seconds, causes = [["imbalance", "uneven load", "--warm"], ["kernels", "tiles and launches", "--pink"],
    ["intra_node", "waits inside nodes", "--green"], ["inter_node", "waits between nodes", "--ink"]];
  const parts = [["limit: all work at full rate, spread evenly", limit, "--accent"], ...causes.map(([key, name, colour]) => [name, stats.layer_excess[key] || 0, colour])];
  const line = element("div", undefined, { className: "line" }), keys = element("div", undefined, { className: "keys" });
  parts.forEach(([name, value, colour], i) => {
    line.append(element("i", undefined, { style: `flex: ${(1000 * Math.max(value, 0) / stats.layer_seconds).toFixed(2)}; background: var(${colour})`, title: `${name}: ${seconds(value)}` }));
    const key = element("div"), words = i ? `+${percent(value / limit)}` : seconds(value);
    key.append(element("i", undefined, { className: "key", style: `background: var(${colour})` }), words + " ", element("span", name));
    keys.append(key);
  });
  $("layer").replaceChildren(element("h3", `A layer takes ${seconds(stats.layer_seconds)}, ${(stats.layer_seconds / limit).toFixed(3)} × what nothing could beat`), line, keys);
  $("layer").hidden = false;
}

// ---------------------------------------------------------------- controls
function pick(rank) { view.rank = rank === view.rank ? null : rank; draw(); }
function rankButtons() {
  const box = $("ranks"), rows = nodeSize.map(() => []);
  if (view.colour === "division") {
    const total = mask().num_divisions, row = element("span", undefined, { className: "node" });
    row.append(element("span", "first"), ...Array.from({ length: total }, (_, d) =>
      element("i", undefined, { className: "key", title: `division ${d}`, style: `margin: 0; background: ${divisionColour(d, total)}` })), element("span", "last division"));
    return box.replaceChildren(row);
  }
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.rank : undefined;
  node.forEach((n, rank) => {
    const colour = rankColour(rank), button = element("button", String(rank), { ariaPressed: String(view.rank === rank), title: `rank ${rank}`, onclick: () => pick(rank) });
    Object.assign(button.style, { background: colour, color: inkOn(colour), opacity: dimmed(rank) ? 0.35 : 1 });
    button.dataset.rank = rank;
    button.tabIndex = rank === (view.rank ?? 0) ? 0 : -1;
    button.onkeydown = event => {
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const next = (rank + by + numRanks) % numRanks;
      view.rank = next; draw();
      $("ranks").querySelector(`[data-rank="${next}"]`).focus();
    };
    rows[n].push(button);
  });
  box.replaceChildren(...rows.slice(0, 64).map((row, n) => {
    const span = element("span", undefined, { className: "node" });
    span.append(element("span", numNodes > 1 ? `node ${n}` : "ranks"), ...row);
    return span;
  }));
  if (focused !== undefined) { const again = box.querySelector(`[data-rank="${focused}"]`); if (again) again.focus(); }
}

// ---------------------------------------------------------------- one rank in words
function rankPanel() {
  const box = $("panel");
  if (view.rank === null) {
    const busiest = mask().rank_area.indexOf(Math.max(...mask().rank_area));
    const p = element("p", "Pick a rank, here, above or in any picture, to read step by step what it computes, sends and receives.", { style: "margin: 0 0 10px" });
    return box.replaceChildren(element("h3", "One rank"), p, element("button", `the one that computes most: rank ${busiest}`, { onclick: () => pick(busiest) }));
  }
  const rank = view.rank, times = mask().passes[view.pass], [intra, inter] = received(), table = element("table"), body = element("tbody");
  const head = element("tr"), columns = [["step", 1], ["attention", 1], ["blocks", 1], ["receives meanwhile", 0], ["sends meanwhile", 0], ["then waits", 1]];
  head.append(...columns.map(([name, number]) => element("th", name, { className: number ? "number" : "", scope: "col" })));
  const blocksIn = Array(times.begin.length).fill(0);
  mask().rank.forEach((ranks, group) => ranks.forEach((r, tile) => { if (r === rank) blocksIn[mask().division[group][tile]]++; }));
  times.begin.forEach((begin, step) => {
    const compute = times.computed[step][rank] - begin[rank], waits = Math.max(times.arrived[step][rank] - Math.max(times.computed[step][rank], begin[rank]), 0);
    const { sent, got } = flowsOf(rank, step + 1), row = element("tr", undefined, { className: compute > 0 || sent.length || got.length ? "" : "idle" });
    const peers = (list, who) => list.sort((a, b) => b.bytes - a.bytes).map(f => `${bytes(f.bytes)} ${who === "source" ? "from" : "to"} ${f[who]}`).join(", ") || "–";
    row.append(element("td", step, { className: "number" }), element("td", compute > 0 ? seconds(compute) : "–", { className: "number" }),
      element("td", blocksIn[step] || "–", { className: "number" }), element("td", peers(got, "source"), { className: "peers" }),
      element("td", peers(sent, "target"), { className: "peers" }), element("td", waits > 0 ? seconds(waits) : "–", { className: "number" }));
    body.append(row);
  });
  table.append(element("thead"), body);
  table.firstChild.append(head);
  const scroll = element("div", undefined, { className: "scroll", tabIndex: 0 }), out = sum(flows().filter(f => f.source === rank).map(f => f.bytes));
  scroll.append(table);
  box.replaceChildren(element("h3", `Rank ${rank} on node ${node[rank]}, ${view.pass}`),
    element("p", `${count(data.rank_tokens[rank])} tokens · ${count(mask().rank_area[rank])} pairs · receives ${bytes(intra[rank] + inter[rank])}, `
      + `${bytes(inter[rank])} of it from other nodes · sends ${bytes(out)}`), scroll);
}

function options(select, label, values) {
  select.replaceChildren(...values.map(value => new Option(value, value)));
  label.hidden = values.length < 2;
}
function draw() { rankButtons(); drawTimeline(); drawTraffic(); rankPanel(); drawLoads(); drawOwners(); drawMatrix(); drawFew(); }
function start() {
  heading();
  options($("mask"), $("mask-label"), Object.keys(data.masks));
  options($("group"), $("group-label"), Array.from({ length: data.num_head_groups }, (_, g) => g));
  for (const name of ["mask", "group", "colour", "pass"]) $(name).onchange = event => {
    view[name] = name === "group" ? Number(event.target.value) : event.target.value;
    draw();
  };
  addEventListener("keydown", event => { if (event.key === "Escape" && view.rank !== null) pick(view.rank); });
  themeButton($("theme"), () => { heading(); draw(); });
  draw();
}
