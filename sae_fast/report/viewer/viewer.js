// The viewer of latents: a table of all, and a page for each. It runs from a folder without a
// server: data are in scripts that call saeFast.meta, vocabulary, table and chunk, and the chunk of
// a latent is loaded when its page is opened. While a model is trained, saeFast.live tells of newer
// data. Texts come from data and are only ever put into text
// nodes, never into markup.
"use strict";

const saeFast = (() => {
  const ROW = 32; // pixels of a row of the table, as in viewer.css
  const KEPT_CHUNKS = 12;
  const LIVE_PAUSE = 10000; // milliseconds between two looks at whether there are newer pages
  const kinds = {
    int8: Int8Array, int16: Int16Array, int32: Int32Array, float32: Float32Array,
    float64: Float64Array,
  };
  const byId = (id) => document.getElementById(id);
  let meta, table, texts = null;
  const chunks = new Map(); // by number: a promise of its arrays
  const waiting = new Map(); // by number: what the promise is kept with

  // ---- data -------------------------------------------------------------------------------

  function decoded([kind, text]) {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new kinds[kind](bytes.buffer);
  }

  function decodedAll(arrays) {
    return Object.fromEntries(Object.entries(arrays).map(([name, array]) => [name, decoded(array)]));
  }

  function load(source, onError) {
    const script = document.createElement("script");
    script.src = source;
    script.onerror = () => { script.remove(); onError(); };
    script.onload = () => script.remove();
    document.body.append(script);
  }

  function lookForNewer() {
    if (!document.hidden) load(`live.js?${Date.now()}`, () => {}); // never from a cache
  }

  function loaded(number) {
    if (chunks.has(number)) return chunks.get(number);
    const promise = new Promise((keep, fail) => {
      waiting.set(number, keep);
      const name = `${document.body.dataset.folder}/latents_${String(number).padStart(5, "0")}.js`;
      const older = meta.step === null ? "" : ": there are newer pages, reload";
      load(name, () => { chunks.delete(number); fail(new Error(`${name} cannot be read${older}`)); });
    });
    chunks.set(number, promise);
    if (chunks.size > KEPT_CHUNKS) chunks.delete(chunks.keys().next().value);
    return promise;
  }

  function tokenText(id) {
    if (texts === null) return id < 0 ? " ·" : ` ${id}`;
    return texts.has(id) ? texts.get(id) : ` ${id}`;
  }

  function visible(text) {
    return text.replace(/\r/g, "␍").replace(/\n/g, "↵").replace(/\t/g, "→");
  }

  // ---- elements ---------------------------------------------------------------------------

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  function chip(id) { return make("span", {class: "chip"}, visible(tokenText(id)).trim() || "␠"); }

  function shortened(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 1000 || size < 0.001 ? value.toExponential(1) : value.toPrecision(3);
  }

  function share(count) {
    if (count === 0) return "never";
    const percent = 100 * count / meta.rows;
    return `${percent >= 0.01 ? percent.toPrecision(2) * 1 : percent.toExponential(0)} %`;
  }

  // ---- the table --------------------------------------------------------------------------

  const COLUMNS = [
    ["Latent", "id", (j) => j, 1],
    ["Tokens of its largest contexts", "", null, 1],
    ["Fires on", "number", (j) => table.fired[j], -1],
    ["Largest", "number", (j) => table.largest[j], -1],
    ["Mean", "number wide", (j) => table.mean[j], -1],
    ["Nearest cos", "number wide", (j) => table.cosine[j], -1],
    ["Fires with φ", "number wide", (j) => table.phi[j], -1],
  ];
  let order = [], sortedBy = 0, direction = 1, searched = "";

  function peaksOf(j) {
    const ids = [];
    for (let i = 0; i < meta.peaks; i++) {
      const id = table.peaks[j * meta.peaks + i];
      if (id >= 0) ids.push(id);
    }
    return ids;
  }

  function refresh() {
    const query = searched.trim().toLowerCase(), onlyAlive = byId("alive").checked;
    const matching = new Set();
    if (query && texts !== null) {
      for (const [id, text] of texts) if (text.toLowerCase().includes(query)) matching.add(id);
    }
    const fits = (j) => !query || String(j) === query || peaksOf(j).some((id) => matching.has(id));
    order = [];
    for (let j = 0; j < meta.latents; j++) {
      const asked = query && String(j) === query;
      if ((asked || !onlyAlive || table.fired[j] > 0) && fits(j)) order.push(j);
    }
    const key = COLUMNS[sortedBy][2];
    order.sort((a, b) => direction * (key(a) - key(b)) || a - b);
    if (/^\d+$/.test(query)) {
      const at = order.indexOf(Number(query));
      if (at > 0) order.unshift(...order.splice(at, 1));
    }
    byId("count").textContent =
      `${order.length.toLocaleString("en")} of ${meta.latents.toLocaleString("en")} latents`;
    byId("spacer").style.height = `${order.length * ROW}px`;
    drawHead();
    drawRows();
  }

  function drawHead() {
    byId("head").replaceChildren(...COLUMNS.map(([name, kind, key, first], number) => {
      if (key === null) return make("span", {class: "number-free"}, make("button", {type: "button", disabled: ""}, name));
      const arrow = number === sortedBy ? (direction > 0 ? " ↑" : " ↓") : "";
      const attributes = {type: "button", class: kind, onclick: () => {
        direction = number === sortedBy ? -direction : first;
        sortedBy = number;
        byId("scroller").scrollTop = 0;
        refresh();
      }};
      if (arrow) attributes["aria-sort"] = direction > 0 ? "ascending" : "descending";
      return make("button", attributes, name + arrow);
    }));
  }

  function rowOf(j) {
    return make(
      "a", {class: "row", href: `#latent=${j}`, role: "row"},
      make("span", {class: "id"}, String(j)),
      make("span", {}, ...peaksOf(j).map(chip)),
      make("span", {class: "number"}, share(table.fired[j])),
      make("span", {class: "number"}, shortened(table.largest[j])),
      make("span", {class: "number wide"}, shortened(table.mean[j])),
      make("span", {class: "number wide"}, table.cosine[j].toFixed(2)),
      make("span", {class: "number wide"}, table.phi[j].toFixed(2)),
    );
  }

  let shown = new Map(); // by latent: its row, of the rows that are drawn
  let isDue = false;

  function drawRows() {
    const scroller = byId("scroller");
    // The head ends where the rows do: a scroll bar has a width on some systems, and none on others.
    byId("head").style.marginRight = `${scroller.offsetWidth - scroller.clientWidth}px`;
    const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - 6);
    const count = Math.ceil(scroller.clientHeight / ROW) + 12;
    byId("rows").style.top = `${first * ROW}px`;
    shown = new Map(order.slice(first, first + count).map((j) => [j, shown.get(j) || rowOf(j)]));
    byId("rows").replaceChildren(...shown.values());
  }

  function drawRowsSoon() { // once a frame, however many events there are
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => { isDue = false; drawRows(); });
  }

  // ---- the page of a latent ---------------------------------------------------------------

  let current = null;

  function figure(name, value) { return make("div", {}, make("dt", {}, name), make("dd", {}, value)); }

  function histogram(title, note, what, counts, low, high) {
    const svgName = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(svgName, "svg");
    svg.setAttribute("viewBox", `0 0 ${counts.length} 100`);
    svg.setAttribute("preserveAspectRatio", "none");
    const most = Math.max(1, ...counts), top = Math.log1p(most);
    counts.forEach((count, bin) => {
      const height = 100 * Math.log1p(count) / top;
      const bar = document.createElementNS(svgName, "rect");
      const numbers = {x: bin + 0.06, width: 0.88, y: 100 - height, height};
      for (const [name, value] of Object.entries(numbers)) bar.setAttribute(name, value);
      const [begin, end] = [bin, bin + 1].map((at) => shortened(low + (high - low) * at / counts.length));
      bar.dataset.tip = `${begin} to ${end}: ${count.toLocaleString("en")} ${what}`;
      svg.append(bar);
    });
    return make("div", {class: "panel histogram"},
      make("h2", {}, `${title} `, make("small", {}, note)), svg,
      make("div", {class: "axis"}, make("span", {}, shortened(low)), make("span", {}, shortened(high))));
  }

  function listed(title, note, items) {
    const rows = items.length ? items : [make("li", {}, make("span", {}, "none"), make("span"))];
    return make("div", {class: "panel"}, make("h2", {}, `${title} `, make("small", {}, note)),
      make("ol", {}, ...rows));
  }

  function neighbours(title, note, latents, values, shown) {
    const items = [];
    latents.forEach((j, place) => {
      if (j < 0) return;
      items.push(make("li", {}, make("a", {href: `#latent=${j}`}, String(j)),
        make("span", {class: "with"}, ...peaksOf(j).slice(0, 2).map(chip)),
        make("span", {}, shown(values[place], place))));
    });
    return listed(title, note, items);
  }

  function tokens(title, note, ids, values) {
    return listed(title, note, Array.from(ids, (id, place) =>
      make("li", {}, chip(id), make("span", {}, values[place].toFixed(3)))));
  }

  function context(part, piece, largest) {
    const first = part.token_offsets[piece], count = part.token_offsets[piece + 1] - first;
    const values = new Map();
    for (let i = part.entry_offsets[piece]; i < part.entry_offsets[piece + 1]; i++) {
      values.set(part.places[i], part.values[i]);
    }
    const text = make("div", {class: "text"});
    for (let place = 0; place < count; place++) {
      const id = part.tokens[first + place], value = values.get(place) || 0;
      const shown = visible(tokenText(id)), word = shown.replace(/^ /, "");
      if (place > 0 && shown !== word) text.append(" "); // without the colour of the word
      const span = make("span", {}, word);
      span.dataset.tip = `${JSON.stringify(tokenText(id))}  ${value === 0 ? "0" : value.toPrecision(5)}`;
      if (value !== 0) {
        const strength = Math.min(1, Math.abs(value) / largest);
        span.style.background =
          `rgba(var(${value > 0 ? "--hot" : "--cold"}), ${(0.07 + 0.73 * strength).toFixed(3)})`;
      }
      if (place === part.peak[piece]) span.className = "peak";
      text.append(span);
    }
    const places = [];
    if (part.document[piece] >= 0) places.push(`document ${part.document[piece]}`);
    if (part.position[piece] >= 0) places.push(`token ${part.position[piece]}`);
    if (!places.length) places.push(`row ${part.row[piece]}`);
    const value = values.get(part.peak[piece]) || 0;
    return make("div", {class: "context"}, make("span", {class: "value"}, shortened(value)), text,
      make("span", {class: "place"}, places.join(", ")));
  }

  function sections(part, index, largest) {
    const groups = new Map();
    for (let piece = part.pieces[index]; piece < part.pieces[index + 1]; piece++) {
      const interval = part.interval[piece];
      if (!groups.has(interval)) groups.set(interval, []);
      groups.get(interval).push(piece);
    }
    return Array.from(groups, ([interval, pieces]) => {
      const percent = (edge) => Math.round(100 * edge / meta.intervals);
      const title = interval < 0 ? "Largest activations "
        : `Sample of ${percent(interval)} to ${percent(interval + 1)} % of the largest `;
      const note = interval < 0 ? "contexts do not overlap; the token of the largest is underlined" : "";
      return make("section", {}, make("h2", {}, title, make("small", {}, note)),
        ...pieces.map((piece) => context(part, piece, largest)));
    });
  }

  function step(by) {
    const at = order.indexOf(current);
    const next = at < 0 ? current + by : order[at + by];
    if (next !== undefined && next >= 0 && next < meta.latents) location.hash = `latent=${next}`;
  }

  function pageOf(j, part) {
    const index = j - Math.floor(j / meta.chunk) * meta.chunk;
    const row = (name, width) => part[name].subarray(index * width, (index + 1) * width);
    const at = order.indexOf(j);
    const fired = table.fired[j], largest = table.largest[j];
    const panels = [];
    if (fired > 0) {
      panels.push(histogram("Activations", "rows, logarithmic", "rows", row("histogram", meta.bins), 0, largest));
    }
    if (meta.logits > 0) {
      panels.push(histogram("Logits", "tokens, logarithmic", "tokens",
        row("logit_histogram", meta.bins), part.smallest_logit[index], part.largest_logit[index]));
      panels.push(tokens("Logits raised", "per unit", row("promoted", meta.logits), row("promoted_logits", meta.logits)));
      panels.push(tokens("Logits lowered", "per unit", row("suppressed", meta.logits), row("suppressed_logits", meta.logits)));
    }
    const width = meta.neighbours;
    panels.push(neighbours("Nearest decoder rows", "cosine", row("decoder_latents", width),
      row("decoder_cosines", width), (value) => value.toFixed(3)));
    const counts = row("cofiring_counts", width);
    panels.push(neighbours("Fires with", "φ, rows of a sample", row("cofiring_latents", width),
      row("cofiring_phi", width), (value, place) => `${value.toFixed(3)}, ${counts[place].toLocaleString("en")}`));
    const button = (label, by, key) => {
      const attributes = {type: "button", title: key, onclick: () => step(by)};
      if (at >= 0 && order[at + by] === undefined) attributes.disabled = "";
      return make("button", attributes, label);
    };
    return make("article", {},
      make("div", {class: "top"}, make("h1", {}, `Latent ${j}`),
        button("← Previous", -1, "←, k"), button("Next →", 1, "→, j"),
        make("span", {class: "spring"}),
        make("span", {class: "keys"}, "← → pages · Esc table · / search · d dark")),
      make("dl", {class: "figures"}, figure("Fires on", share(fired)),
        figure("Rows", fired.toLocaleString("en")), figure("Largest", shortened(largest)),
        figure("Mean where it fires", shortened(table.mean[j]))),
      make("div", {class: "panels"}, ...panels),
      ...(fired > 0 ? sections(part, index, largest)
        : [make("p", {class: "notice"}, "This latent fires on none of the rows.")]));
  }

  async function show() {
    const asked = /^#latent=(\d+)$/.exec(location.hash);
    const j = asked === null ? null : Number(asked[1]);
    const isLatent = j !== null && j < meta.latents;
    byId("overview").hidden = isLatent;
    byId("page").hidden = !isLatent;
    byId("tip").hidden = true;
    current = isLatent ? j : null;
    document.title = isLatent ? `Latent ${j}` : "Latents";
    if (!isLatent) { drawRows(); return; }
    try {
      const part = await loaded(Math.floor(j / meta.chunk));
      if (current === j) byId("page").replaceChildren(pageOf(j, part));
    } catch (error) {
      byId("page").replaceChildren(make("p", {class: "notice"}, error.message));
    }
    byId("page").scrollTop = 0;
  }

  // ---- keys, tooltip, colours -------------------------------------------------------------

  function stored(value) { // a browser may keep nothing of a page from the disk
    try {
      if (value !== undefined) localStorage.setItem("sae_fast_theme", value);
      return localStorage.getItem("sae_fast_theme");
    } catch { return null; }
  }

  function paint(isDark) { document.documentElement.classList.toggle("dark", isDark); }

  function turn() {
    const isDark = !document.documentElement.classList.contains("dark");
    paint(isDark);
    stored(isDark ? "dark" : "light");
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inSearch = event.target === byId("search");
    if (event.key === "Escape") { event.target.blur(); location.hash = ""; return; }
    if (inSearch) {
      if (event.key === "Enter" && order.length) location.hash = `latent=${order[0]}`;
      return;
    }
    if (event.key === "/") { event.preventDefault(); location.hash = ""; setTimeout(() => byId("search").focus()); }
    if (event.key === "d") turn();
    if (current === null) return;
    if (event.key === "ArrowRight" || event.key === "j") step(1);
    if (event.key === "ArrowLeft" || event.key === "k") step(-1);
  }

  function onMove(event) {
    const tip = byId("tip"), text = event.target.dataset && event.target.dataset.tip;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - 34 : event.clientY + 18}px`;
  }

  const kept = stored();
  paint(kept === null ? matchMedia("(prefers-color-scheme: dark)").matches : kept === "dark");

  return {
    meta(given) { meta = given; },
    vocabulary(given) { texts = given && new Map(given.ids.map((id, i) => [id, given.texts[i]])); },
    table(given) { table = decodedAll(given); },
    live(step) {
      const button = byId("newer");
      button.hidden = step <= meta.step;
      button.textContent = `Step ${step.toLocaleString("en")} is there: reload`;
    },
    chunk(number, given) {
      const keep = waiting.get(number);
      waiting.delete(number);
      if (keep) keep(decodedAll(given));
    },
    start() {
      byId("title").textContent = meta.title;
      byId("subtitle").textContent = meta.subtitle;
      byId("search").addEventListener("input", (event) => {
        searched = event.target.value;
        byId("scroller").scrollTop = 0;
        refresh();
      });
      byId("alive").addEventListener("change", refresh);
      byId("scroller").addEventListener("scroll", drawRowsSoon, {passive: true});
      byId("theme").addEventListener("click", turn);
      byId("newer").addEventListener("click", () => location.reload());
      if (meta.step !== null) setInterval(lookForNewer, LIVE_PAUSE);
      addEventListener("resize", () => { if (current === null) drawRows(); });
      addEventListener("hashchange", show);
      addEventListener("keydown", onKey);
      addEventListener("mousemove", onMove);
      refresh();
      show();
    },
  };
})();
