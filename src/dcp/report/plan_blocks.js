// ---------------------------------------------------------------- documents: who owns their tokens
const sequenceStart = []; seqlens.reduce((start, n) => (sequenceStart.push(start), start + n), 0);
const offset = block => sequenceStart[blocks.sequence[block]] + blocks.position[block];
const inOrder = blocks.length.map((_, block) => block).sort((a, b) => offset(a) - offset(b)), ownerStart = inOrder.map(offset);
const blocksOf = seqlens.map(() => []);
inOrder.forEach(block => blocksOf[blocks.sequence[block]].push(block));
const byLength = seqlens.map((_, s) => s).filter(s => seqlens[s] > 0).sort((a, b) => seqlens[b] - seqlens[a]);
const allTokens = Math.max(sum(seqlens), 1);
view.sequence = byLength.length ? byLength[0] : null;
function showDocument(sequence) { Object.assign(view, { sequence, x: [0, 1], y: [0, 1] }); matrix.pointed = null; draw(); }

const owners = {
  pointed: null, height: 34,
  get width() { return room(document.body); },
  at(px, py) { return !inOrder.length || py > this.height ? null : last(ownerStart, px / this.width * allTokens); },
  text(index) {
    const block = inOrder[index];
    return `document ${blocks.sequence[block]}, tokens ${tokenRange(block)} of ${count(seqlens[blocks.sequence[block]])}\nowned by rank ${blocks.owner[block]}, node ${node[blocks.owner[block]]}`;
  },
  first: () => inOrder.length ? 0 : null,
  step: (index, right, down) => clamp(index + right + down, 0, inOrder.length - 1),
  place(index) { const block = inOrder[index]; return [(offset(block) + blocks.length[block] / 2) / allTokens * this.width, this.height / 2]; },
  pick: index => showDocument(blocks.sequence[inOrder[index]]),
  point(what) { owners.pointed = what; drawOwners(); },
};
function drawOwners() {
  const { width, height } = owners, pen = prepare($("owners"), width, height + 20), x = token => token / allTokens * width;
  for (const block of inOrder) {
    pen.globalAlpha = dimmed(blocks.owner[block]) ? 0.12 : 1;
    pen.fillStyle = rankColour(blocks.owner[block]);
    pen.fillRect(x(offset(block)), 0, Math.max(x(blocks.length[block]), 0.4), height);
  }
  pen.globalAlpha = 1;
  pen.fillStyle = css("--page");
  seqlens.forEach((n, s) => { if (s && n && seqlens.length < width / 4) pen.fillRect(x(sequenceStart[s]) - 0.75, 0, 1.5, height); });
  pen.fillStyle = css("--ink");
  if (view.sequence !== null) pen.fillRect(x(sequenceStart[view.sequence]), height + 2, Math.max(x(seqlens[view.sequence]), 3), 3);
  if (owners.pointed !== null) {
    const block = inOrder[owners.pointed];
    pen.strokeStyle = css("--ink"); pen.lineWidth = 2; pen.strokeRect(x(offset(block)), 1, Math.max(x(blocks.length[block]), 1), height - 2);
  }
  pen.fillStyle = css("--soft");
  pen.fillText("0", 0, height + 14); pen.textAlign = "right";
  pen.fillText(`${count(sum(seqlens))} tokens`, width, height + 14);
}

// ---------------------------------------------------------------- one document's blocks
const tilesMade = new Map();
function tilesOf(sequence) {
  if (!tilesMade.has(view.mask)) {
    const found = seqlens.map(() => []);
    mask().q.forEach((block, tile) => found[blocks.sequence[block]].push(tile));
    tilesMade.set(view.mask, found);
  }
  return tilesMade.get(view.mask)[sequence];
}
const tileColour = tile => view.colour === "rank" ? rankColour(mask().rank[view.group][tile]) : divisionColour(mask().division[view.group][tile], mask().num_divisions);

const matrix = {
  pointed: null, strip: 10, gap: 3,
  get side() { return Math.min(room(document.body), 600); },
  get origin() { return this.strip + this.gap; },
  get span() { return this.side - this.origin; },
  token(pixel, [from, to]) { return (from + (pixel - this.origin) / this.span * (to - from)) * seqlens[view.sequence]; },
  pixel(token, [from, to]) { return this.origin + (token / seqlens[view.sequence] - from) / (to - from) * this.span; },
  at(px, py) {
    if (view.sequence === null || px < this.origin || py < this.origin || px > this.side || py > this.side) return null;
    const mine = blocksOf[view.sequence], starts = mine.map(b => blocks.position[b]);
    return { q: last(starts, this.token(py, view.y)), k: last(starts, this.token(px, view.x)) };
  },
  tile({ q, k }) { const mine = blocksOf[view.sequence]; return tilesOf(view.sequence).find(t => mask().q[t] === mine[q] && mask().k[t] === mine[k]); },
  text(what) {
    const mine = blocksOf[view.sequence], q = mine[what.q], k = mine[what.k], tile = this.tile(what);
    const where = `queries ${tokenRange(q)} × keys ${tokenRange(k)}`;
    if (tile === undefined) return `${where}\nthe mask leaves nothing to compute here`;
    const m = mask(), g = view.group, rank = m.rank[g][tile], moves = m.moves, size = m.moves[view.pass];
    const through = (rank, owner) => rank === owner ? "" : `, passed on by rank ${rank}`;
    const came = (name, what, block) => {
      const move = m[name][g][tile], owner = blocks.owner[block];
      return move < 0 ? `${what}: its own` : `${what}: of rank ${owner}, come in communication ${moves.step[move]}${through(moves.source[move], owner)}`;
    };
    const goes = (name, what, block) => {
      const move = m[name][g][tile], owner = blocks.owner[block];
      return move < 0 || !size[move] ? `${what}: its own` : `${what}: to rank ${owner}, go in communication ${moves.step[move]}${moves.target[move] === owner ? "" : `, by way of rank ${moves.target[move]}`}`;
    };
    const part = m.area[tile] / (blocks.length[q] * blocks.length[k]), back = view.pass === "backward";
    return [where, `rank ${rank} computes it in division ${m.division[g][tile]}: ${seconds(m.seconds[view.pass][g][tile])}, ${count(m.area[tile])} pairs (${percent(part)})`,
      came("q_move", "queries", q), came("kv_move", "keys and values", k), goes("out_move", back ? "query gradients" : "outputs", q),
      ...(back ? [goes("dkv_move", "key and value gradients", k)] : [])].join("\n");
  },
  first: () => view.sequence === null ? null : { q: 0, k: 0 },
  step: ({ q, k }, right, down) => { const n = blocksOf[view.sequence].length - 1; return { q: clamp(q + down, 0, n), k: clamp(k + right, 0, n) }; },
  place({ q, k }) {
    const at = (index, part) => { const b = blocksOf[view.sequence][index]; return clamp(this.pixel(blocks.position[b] + blocks.length[b] / 2, part), this.origin, this.side - 2); };
    return [at(k, view.x), at(q, view.y)];
  },
  pick(what) { const tile = matrix.tile(what); if (tile !== undefined) pick(mask().rank[view.group][tile]); },
  point(what) { matrix.pointed = what; drawMatrix(); },
  zoom(factor, px, py) {
    const at = (pixel, [from, to]) => from + clamp((pixel - this.origin) / this.span, 0, 1) * (to - from);
    [view.x, view.y] = [zoomed(view.x, factor, at(px, view.x)), zoomed(view.y, factor, at(py, view.y))];
    drawMatrix();
  },
  pan(px, py) { view.x = moved(view.x, px / this.span); view.y = moved(view.y, py / this.span); drawMatrix(); },
  reset() { view.x = [0, 1]; view.y = [0, 1]; drawMatrix(); },
};
function worksOn() {  // where the picked rank computes, if not here
  if (view.rank === null) return "";
  const found = new Set();
  mask().rank[view.group].forEach((rank, tile) => { if (rank === view.rank) found.add(blocks.sequence[mask().q[tile]]); });
  const list = [...found].sort((a, b) => seqlens[b] - seqlens[a]);
  return `; rank ${view.rank} ` + (list.length ? `computes in ${list.length > 1 ? "documents" : "document"} ${list.slice(0, 8).join(", ")}${list.length > 8 ? ", …" : ""}` : "computes nothing");
}
function drawMatrix() {
  const { side, origin, strip, span } = matrix, pen = prepare($("matrix"), side, side);
  if (view.sequence === null) { $("matrix-says").textContent = "No document has a token."; return; }
  const mine = blocksOf[view.sequence], scale = span / seqlens[view.sequence] / (view.x[1] - view.x[0]);
  $("matrix-says").textContent = `document ${view.sequence}: ${plural(seqlens[view.sequence], "token")} in ${plural(mine.length, "block")}` + (view.x[1] - view.x[0] < 1 ? `, ${(1 / (view.x[1] - view.x[0])).toFixed(1)} × larger` : "") + worksOn();
  pen.fillStyle = css("--empty"); pen.fillRect(origin, origin, span, span);
  for (const block of mine) {
    const length = blocks.length[block] * scale, x = matrix.pixel(blocks.position[block], view.x), y = matrix.pixel(blocks.position[block], view.y);
    pen.globalAlpha = dimmed(blocks.owner[block]) ? 0.15 : 1;
    pen.fillStyle = rankColour(blocks.owner[block]);
    const cut = from => [Math.max(from, origin), Math.min(from + length, side)];
    const [x0, x1] = cut(x), [y0, y1] = cut(y);
    if (x1 > x0) pen.fillRect(x0, 0, x1 - x0, strip);
    if (y1 > y0) pen.fillRect(0, y0, strip, y1 - y0);
  }
  pen.save();
  pen.beginPath(); pen.rect(origin, origin, span, span); pen.clip();
  paintTiles(pen, view.sequence, b => matrix.pixel(blocks.position[b], view.x), b => matrix.pixel(blocks.position[b], view.y), scale, [origin, side]);
  if (matrix.pointed) {
    const q = mine[matrix.pointed.q], k = mine[matrix.pointed.k];
    pen.globalAlpha = 1; pen.strokeStyle = css("--ink"); pen.lineWidth = 2;
    pen.strokeRect(matrix.pixel(blocks.position[k], view.x), matrix.pixel(blocks.position[q], view.y), blocks.length[k] * scale, blocks.length[q] * scale);
  }
  pen.restore();
}
function paintTiles(pen, sequence, left, above, scale, [low, high]) {
  const m = mask(), panel = css("--panel");
  for (const tile of tilesOf(sequence)) {
    const q = m.q[tile], k = m.k[tile], x = left(k), y = above(q), height = blocks.length[q] * scale, width = blocks.length[k] * scale;
    if (x > high || y > high || x + width < low || y + height < low) continue;
    const fade = dimmed(m.rank[view.group][tile]) ? 0.1 : 1, colour = tileColour(tile);
    pen.fillStyle = colour;
    if (m.slices && height > 3) {
      pen.globalAlpha = fade;
      for (let i = m.slice_start[tile]; i < m.slice_start[tile + 1]; i++) fillSlice(pen, m.slices[i], x, y, scale);
    } else {
      pen.globalAlpha = fade * (0.35 + 0.65 * m.area[tile] / (blocks.length[q] * blocks.length[k]));
      pen.fillRect(x, y, width, height);
    }
    if (Math.min(width, height) > 7) { pen.globalAlpha = Math.max(fade, 0.4); pen.strokeStyle = panel; pen.lineWidth = 0.8; pen.strokeRect(x, y, width, height); }
    const cut = m.area[tile] < blocks.length[q] * blocks.length[k];
    if (Math.min(width, height) > (cut ? 34 : 13)) {
      pen.globalAlpha = fade; pen.fillStyle = inkOn(colour); pen.textAlign = "center";
      pen.font = FONT.replace("12px", (width > 22 ? 11 : 9) + "px");
      pen.fillText(String(view.colour === "rank" ? m.rank[view.group][tile] : m.division[view.group][tile]), x + width * (cut ? 0.3 : 0.5), y + height * (cut ? 0.7 : 0.5));
    }
  }
  pen.globalAlpha = 1; pen.textAlign = "left"; pen.font = FONT;
}
// A slice is a rectangle cut by a band of diagonals: lo <= k - q <= hi. Cut the corners off.
function fillSlice(pen, [q0, q1, k0, k1, lo, hi], x, y, scale) {
  let shape = [[k0, q0], [k1, q0], [k1, q1], [k0, q1]];
  const cut = inside => {
    const kept = [];
    shape.forEach((a, i) => {
      const b = shape[(i + 1) % shape.length], da = inside(a), db = inside(b);
      if (da >= 0) kept.push(a);
      if ((da < 0) !== (db < 0)) { const t = da / (da - db); kept.push([a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])]); }
    });
    shape = kept;
  };
  if (lo > k0 - q1 + 1) cut(([k, q]) => k - q - lo + 0.5);
  if (hi < k1 - q0 - 1) cut(([k, q]) => hi + 0.5 - (k - q));
  if (!shape.length) return;
  pen.beginPath();
  shape.forEach(([k, q], i) => i ? pen.lineTo(x + k * scale, y + q * scale) : pen.moveTo(x + k * scale, y + q * scale));
  pen.fill();
}

// ---------------------------------------------------------------- all documents, small
const FIRST_FEW = 120;
function drawFew() {
  const box = $("few"), longest = Math.max(...seqlens, 1), wanted = byLength.slice(0, FIRST_FEW), scrolled = box.scrollTop;
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.document : undefined;
  box.hidden = byLength.length < 2;
  box.replaceChildren(...wanted.map(sequence => {
    const side = Math.max(26, Math.round(104 * Math.pow(seqlens[sequence] / longest, 0.5))), canvas = element("canvas"), pen = prepare(canvas, side, side);
    const button = element("button", undefined, { title: `document ${sequence}, ${plural(seqlens[sequence], "token")}`, ariaPressed: String(view.sequence === sequence), onclick: () => showDocument(sequence) });
    const scale = side / seqlens[sequence];
    pen.fillStyle = css("--empty"); pen.fillRect(0, 0, side, side);
    paintTiles(pen, sequence, b => blocks.position[b] * scale, b => blocks.position[b] * scale, scale, [0, side]);
    button.dataset.document = sequence;
    button.append(canvas, String(sequence));
    return button;
  }));
  if (byLength.length > FIRST_FEW) box.append(element("span", `and ${byLength.length - FIRST_FEW} shorter ones: pick them in the line above`, { className: "hint" }));
  box.scrollTop = scrolled;
  if (focused !== undefined) { const again = box.querySelector(`[data-document="${focused}"]`); if (again) again.focus(); }
}

chart($("timeline"), timeline);
chart($("traffic"), traffic);
chart($("loads"), loads);
chart($("owners"), owners);
chart($("matrix"), matrix);
zoomButtons($("timeline-zoom"), timeline, () => [timeline.width / 2, 0]);
zoomButtons($("matrix-zoom"), matrix, () => [matrix.side / 2, matrix.side / 2]);
start();
