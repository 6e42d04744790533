// ---------------------------------------------------------------- timeline: steps of every rank
const rowHeight = (least = 5) => clamp(Math.floor(720 / numRanks), least, 22), LEFT = 30;
function rankLabels(pen, top, height, left = LEFT) {
  pen.textAlign = "right";
  const every = Math.ceil(13 / height);
  for (let rank = 0; rank < numRanks; rank++) {
    if (rank % every && rank !== view.rank) continue;
    pen.fillStyle = css(rank === view.rank ? "--ink" : "--soft");
    pen.font = (rank === view.rank ? "bold " : "") + FONT;
    pen.fillText(String(rank), left - 6, top + (rank + 0.5) * height);
  }
  pen.font = FONT;
  pen.textAlign = "left";
}
const timeline = {
  top: 24, pointed: null,
  get width() { return room(document.body); },
  get total() { return mask().passes[view.pass].seconds || 1e-9; },
  x(s) { return LEFT + (s / this.total - view.time[0]) / (view.time[1] - view.time[0]) * (this.width - LEFT); },
  at(px, py) {
    const rank = Math.floor((py - this.top) / rowHeight()), part = view.time[0] + (px - LEFT) / (this.width - LEFT) * (view.time[1] - view.time[0]);
    if (rank < 0 || rank >= numRanks || px < LEFT - 24) return null;
    return { rank, step: last(mask().passes[view.pass].begin.map(row => row[rank]), Math.max(part, 0) * this.total) };
  },
  text({ rank, step }) {
    const times = mask().passes[view.pass], begin = times.begin[step][rank], compute = times.computed[step][rank] - begin, move = times.arrived[step][rank] - begin;
    const { sent, got } = flowsOf(rank, step + 1), size = list => sum(list.map(f => f.bytes));
    const lines = [`rank ${rank}, step ${step}, from ${seconds(begin)} on`, compute > 0 ? `division ${step}: ${seconds(compute)} of attention` : "no attention"];
    if (move > 0) lines.push(`communication ${step + 1}: ${seconds(move)}` + (move > compute ? `, of which ${seconds(move - compute)} is waiting` : ", hidden"));
    const tell = (list, verb, who) => list.sort((a, b) => b.bytes - a.bytes).slice(0, 4).forEach(f => lines.push(`  ${verb} rank ${f[who]}: ${kinds(f)}`));
    tell(got, "from", "source");
    tell(sent, "to", "target");
    if (got.length > 4 || sent.length > 4) lines.push(`  in all ${bytes(size(got))} from ${got.length} ranks, ${bytes(size(sent))} to ${sent.length}`);
    return lines.join("\n");
  },
  first: () => ({ rank: view.rank ?? 0, step: 0 }),
  step: ({ rank, step }, right, down) => ({ rank: clamp(rank + down, 0, numRanks - 1), step: clamp(step + right, 0, mask().passes[view.pass].begin.length - 1) }),
  place({ rank, step }) {
    const times = mask().passes[view.pass], end = Math.max(times.computed[step][rank], times.arrived[step][rank]);
    return [clamp(this.x((times.begin[step][rank] + end) / 2), LEFT, this.width - 4), this.top + (rank + 0.5) * rowHeight()];
  },
  pick: ({ rank }) => pick(rank),
  point(what) { timeline.pointed = what; drawTimeline(); },
  zoom(factor, px) { view.time = zoomed(view.time, factor, view.time[0] + clamp((px - LEFT) / (this.width - LEFT), 0, 1) * (view.time[1] - view.time[0])); drawTimeline(); },
  pan(px) { view.time = moved(view.time, px / (this.width - LEFT)); drawTimeline(); },
  reset() { view.time = [0, 1]; drawTimeline(); },
};
function drawTimeline() {
  const times = mask().passes[view.pass], steps = times.begin.length, height = rowHeight(), { top, width, total } = timeline;
  const pen = prepare($("timeline"), width, top + numRanks * height + 2), x = s => timeline.x(s), below = top + numRanks * height;
  const marks = ticks(view.time[0] * total, view.time[1] * total, width / 130);
  for (const at of marks) {
    pen.fillStyle = css("--line"); pen.fillRect(x(at), 17, 1, below - 17);
    pen.fillStyle = css("--soft"); if (x(at) < width - 50) pen.fillText(at ? seconds(at) : "0", x(at) + 3, 9);
  }
  rankLabels(pen, top, height);
  pen.save();
  pen.beginPath(); pen.rect(LEFT, 0, width - LEFT, below + 2); pen.clip();
  const wait = css("--wait"), gap = height > 9 ? 1.5 : 0.5;
  for (let rank = 0; rank < numRanks; rank++) {
    const y = top + rank * height + gap / 2, tall = height - gap, upper = tall * 0.66, own = rankColour(rank);
    pen.globalAlpha = dimmed(rank) ? 0.16 : 1;
    for (let step = 0; step < steps; step++) {
      const from = x(times.begin[step][rank]), to = x(times.computed[step][rank]), got = x(times.arrived[step][rank]);
      if (Math.max(to, got) < LEFT || from > width) continue;
      const cut = length => Math.max(length - (length > 4 ? 1 : 0), 0.5), colour = view.colour === "rank" ? own : divisionColour(step, mask().num_divisions);
      if (got > from) { pen.fillStyle = wait; pen.fillRect(from, y + upper + 0.5, cut(got - from), tall - upper - 0.5); }
      if (to > from) {
        pen.fillStyle = colour; pen.fillRect(from, y, cut(to - from), got > from ? upper : tall);
        if (to - from > 26 && upper > 9) { pen.fillStyle = inkOn(colour); pen.font = FONT.replace("12px", "10px"); pen.fillText(String(step), Math.max(from, LEFT) + 4, y + upper / 2 + 0.5); pen.font = FONT; }
      }
    }
  }
  pen.globalAlpha = 1;
  if (timeline.pointed) pointAtStep(pen, timeline.pointed, height);
  pen.restore();
}
function pointAtStep(pen, { rank, step }, height) {  // the step that is pointed at, and who exchanges with it meanwhile
  const times = mask().passes[view.pass], { top, width } = timeline, begin = times.begin[step][rank];
  const from = timeline.x(begin), to = timeline.x(Math.max(times.computed[step][rank], times.arrived[step][rank], begin));
  const { sent, got } = flowsOf(rank, step + 1), most = Math.max(...sent.concat(got).map(f => f.bytes), 1), middle = r => top + (r + 0.5) * height;
  pen.strokeStyle = css("--ink"); pen.lineWidth = 1.5;
  pen.strokeRect(from - 0.5, top + rank * height, Math.max(to - from, 2), height);
  for (const [list, who, colour, side] of [[got, "source", "--accent", -1], [sent, "target", "--warm", 1]]) {
    pen.strokeStyle = pen.fillStyle = css(colour);
    const x = clamp((from + to) / 2 + 5 * side, LEFT + 5, width - 5);
    for (const flow of list) {
      const other = flow[who], ends = side > 0 ? [rank, other] : [other, rank], up = ends[1] < ends[0] ? 1 : -1;
      pen.lineWidth = 1 + 2.5 * flow.bytes / most;
      pen.beginPath(); pen.moveTo(x, middle(ends[0])); pen.lineTo(x, middle(ends[1]) + 4 * up); pen.stroke();
      pen.beginPath(); pen.moveTo(x, middle(ends[1])); pen.lineTo(x - 4, middle(ends[1]) + 7 * up); pen.lineTo(x + 4, middle(ends[1]) + 7 * up); pen.fill();
    }
  }
}

// ---------------------------------------------------------------- traffic: bytes from every rank to every other
const traffic = {
  pointed: null, top: 22,
  get side() { return Math.min(room(document.body), 460); },
  get cell() { return (this.side - LEFT) / numRanks; },
  at(px, py) {
    const target = Math.floor((px - LEFT) / this.cell), source = Math.floor((py - this.top) / this.cell);
    return target < 0 || source < 0 || target >= numRanks || source >= numRanks ? null : { source, target };
  },
  text({ source, target }) {
    if (source === target) return `rank ${source}: what it keeps does not travel`;
    const list = flows().filter(f => f.source === source && f.target === target).sort((a, b) => a.step - b.step);
    const where = node[source] === node[target] ? `inside node ${node[source]}` : `from node ${node[source]} to node ${node[target]}`;
    if (!list.length) return `rank ${source} sends nothing to rank ${target}, ${where}`;
    const lines = list.slice(0, 8).map(f => `communication ${f.step}: ${kinds(f)}`);
    if (list.length > 8) lines.push(`and ${list.length - 8} more`);
    return [`rank ${source} to rank ${target}, ${where}: ${bytes(sum(list.map(f => f.bytes)))}`, ...lines].join("\n");
  },
  first: () => ({ source: view.rank ?? 0, target: 0 }),
  step: ({ source, target }, right, down) => ({ source: clamp(source + down, 0, numRanks - 1), target: clamp(target + right, 0, numRanks - 1) }),
  place({ source, target }) { return [LEFT + (target + 0.5) * this.cell, this.top + (source + 0.5) * this.cell]; },
  pick: ({ source }) => pick(source),
  point(what) { traffic.pointed = what; drawTraffic(); },
};
function drawTraffic() {
  const { side, cell, top } = traffic, pen = prepare($("traffic"), side, side + top - LEFT + 2), total = Array.from({ length: numRanks }, () => Array(numRanks).fill(0));
  for (const f of flows()) total[f.source][f.target] += f.bytes;
  const most = Math.max(...total.flat(), 1), far = sum(flows().filter(f => node[f.source] !== node[f.target]).map(f => f.bytes)), all = sum(flows().map(f => f.bytes));
  $("traffic-says").textContent = `One row sends, one column receives; darker is more, up to ${bytes(most)}. In a ${view.pass} pass ${bytes(all)} move, `
    + `${bytes(far)} of them between nodes (orange), the rest inside (blue).`;
  pen.fillStyle = css("--empty"); pen.fillRect(LEFT, top, side - LEFT, side - LEFT);
  const inside = css("--accent"), between = css("--warm");
  total.forEach((row, source) => row.forEach((n, target) => {
    const faint = view.rank !== null && view.rank !== source && view.rank !== target ? 0.15 : 1;
    if (!n) return;
    pen.globalAlpha = (0.12 + 0.88 * Math.sqrt(n / most)) * faint;
    pen.fillStyle = node[source] === node[target] ? inside : between;
    pen.fillRect(LEFT + target * cell, top + source * cell, cell - (cell > 5 ? 1 : 0), cell - (cell > 5 ? 1 : 0));
  }));
  pen.globalAlpha = 1;
  pen.fillStyle = css("--soft");
  node.forEach((n, rank) => {  // lines between nodes
    if (!rank || n === node[rank - 1]) return;
    pen.fillRect(LEFT + rank * cell - 1, top, 1, side - LEFT); pen.fillRect(LEFT, top + rank * cell - 1, side - LEFT, 1);
  });
  rankLabels(pen, top, cell);
  pen.textAlign = "center";
  const every = Math.ceil(18 / cell);
  for (let rank = 0; rank < numRanks; rank += every) pen.fillText(String(rank), LEFT + (rank + 0.5) * cell, top - 9);
  pen.textAlign = "left";
  if (traffic.pointed) {
    const { source, target } = traffic.pointed;
    pen.strokeStyle = css("--ink"); pen.lineWidth = 1.5;
    pen.strokeRect(LEFT + target * cell - 1, top + source * cell - 1, cell + 1, cell + 1);
  }
}

// ---------------------------------------------------------------- loads
const loads = {
  pointed: null, top: 24,
  get charts() {
    const [intra, inter] = received();
    return [
      { name: "pairs computed", values: mask().rank_area, show: n => count(Math.round(n)) },
      { name: "tokens owned", values: data.rank_tokens, show: n => count(Math.round(n)) },
      { name: "received", values: intra.map((n, r) => n + inter[r]), part: inter, show: bytes },
    ];
  },
  get across() { return room(document.body) < 600 ? 1 : 3; },
  get each() { return (room(document.body) - (this.across - 1) * 28) / this.across - LEFT; },
  get tall() { return this.top + numRanks * this.row + 22; },
  get row() { return clamp(Math.floor((this.across === 1 ? 400 : 560) / numRanks), 4, 18); },
  corner(index) { return this.across === 1 ? [LEFT, index * this.tall] : [LEFT + index * (this.each + LEFT + 28), 0]; },
  at(px, py) {
    const index = [0, 1, 2].find(i => { const [x, y] = this.corner(i); return px >= x - LEFT && px < x + this.each && py >= y && py < y + this.tall; });
    if (index === undefined) return null;
    const rank = Math.floor((py - this.corner(index)[1] - this.top) / this.row);
    return rank < 0 || rank >= numRanks ? null : { rank, index };
  },
  text({ rank }) {
    const [intra, inter] = received(), mean = list => sum(list) / numRanks, over = (n, list) => mean(list) ? ` (${(n / mean(list)).toFixed(3)} × the mean)` : "";
    return `rank ${rank}, node ${node[rank]}\n${count(mask().rank_area[rank])} pairs${over(mask().rank_area[rank], mask().rank_area)}\n`
      + `${count(data.rank_tokens[rank])} tokens${over(data.rank_tokens[rank], data.rank_tokens)}\nreceives ${bytes(inter[rank])} from other nodes, ${bytes(intra[rank])} from its own`;
  },
  first: () => ({ rank: view.rank ?? 0, index: 0 }),
  step: ({ rank, index }, right, down) => ({ rank: clamp(rank + down, 0, numRanks - 1), index: clamp(index + right, 0, 2) }),
  place({ rank, index }) { const [x, y] = this.corner(index); return [x + this.each / 2, y + this.top + (rank + 0.5) * this.row]; },
  pick: ({ rank }) => pick(rank),
  point(what) { loads.pointed = what; drawLoads(); },
};
function drawLoads() {
  const { top, row, each, across, tall } = loads, pen = prepare($("loads"), room(document.body), across === 1 ? 3 * tall : tall);
  loads.charts.forEach((of, index) => {
    const [left, above] = loads.corner(index), most = Math.max(...of.values, 1), mean = sum(of.values) / numRanks, y = rank => above + top + rank * row;
    pen.save(); pen.translate(left - LEFT, above); rankLabels(pen, top, row); pen.restore();
    pen.fillStyle = css("--ink"); pen.fillText(`${of.name}; most ${of.show(most)}`, left, above + 9);
    of.values.forEach((value, rank) => {
      const thick = row - (row > 6 ? 2 : 0.5), fade = dimmed(rank) ? 0.16 : 1;
      pen.fillStyle = rankColour(rank);
      pen.globalAlpha = fade * (of.part ? 0.42 : 1);
      pen.fillRect(left, y(rank), value / most * each, thick);
      if (of.part) { pen.globalAlpha = fade; pen.fillRect(left, y(rank), of.part[rank] / most * each, thick); }
    });
    pen.globalAlpha = 1; pen.fillStyle = css("--ink");
    if (mean) pen.fillRect(left + mean / most * each - 0.75, above + top - 3, 1.5, numRanks * row + 4);
    if (loads.pointed) { pen.strokeStyle = css("--ink"); pen.lineWidth = 1; pen.strokeRect(left - 1, y(loads.pointed.rank) - 1, each, row); }
  });
}
