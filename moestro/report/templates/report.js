"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const group = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, "\u202f");
  const short = (v) => {
    if (v === null) return "no value";
    if (Number.isInteger(v)) return group(v);
    return Math.abs(v) >= 1000 ? v.toFixed(1) : String(Number(v.toPrecision(4)));
  };
  document.documentElement.classList.add("live");

  const unpack = (packed) => {
    const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const size = packed.bits / 8;
    const read = { 1: (i) => view.getUint8(i), 2: (i) => view.getUint16(i, true), 4: (i) => view.getUint32(i, true) }[size];
    const out = new Array(bytes.length / size);
    for (let i = 0; i < out.length; i++) out[i] = Math.round(read(i * size) * packed.scale);
    return out;
  };

  // The rules of moestro/report/scale.py: what a count is compared with. NaN where nothing was to be expected.
  const ratios = (map) => {
    const [R, C] = [map.rows.length, map.columns.length];
    const n = map.n, out = new Float64Array(R * C).fill(NaN);
    const width = (r) => (map.sizes ? map.sizes[r] : C);
    const sum = (values, r) => { let s = 0; for (let c = 0; c < width(r); c++) s += values[r * C + c]; return s; };
    if (map.rule === "row" || map.rule === "share") {
      for (let r = 0; r < R; r++) {
        const own = sum(n, r), whole = map.rule === "share" ? sum(map.e, r) : 0;
        for (let c = 0; c < width(r); c++) {
          const due = map.rule === "row" ? own / width(r) : map.e[r * C + c] * own / whole;
          if (due > 0) out[r * C + c] = n[r * C + c] / due;
        }
      }
    } else if (map.rule === "transition") {
      const rows = new Float64Array(R), columns = new Float64Array(C);
      let total = 0;
      n.forEach((v, i) => { rows[Math.floor(i / C)] += v; columns[i % C] += v; total += v; });
      n.forEach((v, i) => { const due = rows[Math.floor(i / C)] * columns[i % C] / total; if (due > 0) out[i] = v / due; });
    } else {
      n.forEach((v, i) => {
        const [r, c] = [Math.floor(i / C), i % C], due = map.factors[r] * map.factors[c];
        if (r !== c && due > 0) out[i] = v / due;
      });
    }
    return out;
  };
  const step = (ratio) => (ratio === 0 ? "z" : "b" + data.edges.filter((edge) => ratio >= edge).length);

  const opened = (map) => {
    if (!map.n) {
      map.n = unpack(map.counts);
      if (map.expected) map.e = unpack(map.expected);
      map.ratio = ratios(map);
    }
    return map;
  };

  const centred = (labels, most, edge) => {
    let every = Math.max(1, Math.ceil(labels.length / most));
    if (every > 1) every = [2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 100, 128, 1e9].find((s) => s >= every);
    return labels.flatMap((text, i) => {
      if (i % every) return [];
      const span = document.createElement("span");
      span.textContent = text;
      span.style[edge] = (100 * (i + 0.5) / labels.length).toFixed(2) + "%";
      return [span];
    });
  };

  const draw = (area, map) => {
    const [R, C] = [map.rows.length, map.columns.length];
    const paths = new Map();
    for (let r = 0; r < R; r++) {
      for (let c = 0; c < C;) {
        const ratio = map.ratio[r * C + c];
        if (Number.isNaN(ratio)) { c++; continue; }
        const kind = step(ratio);
        let end = c + 1;
        while (end < C && !Number.isNaN(map.ratio[r * C + end]) && step(map.ratio[r * C + end]) === kind) end++;
        paths.set(kind, (paths.get(kind) || "") + `M${c} ${r}h${end - c}v1H${c}z`);
        c = end;
      }
    }
    const cells = area.querySelector(".cells");
    cells.replaceChildren(...[...paths].map(([kind, d]) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("class", kind);
      path.setAttribute("d", d);
      return path;
    }));
    const svg = area.querySelector("svg"), fine = Math.max(R, C) <= 72;
    let lines = "", strokes = "";
    for (let r = 1; fine && r < R; r++) lines += `M0 ${r}H${C}`;
    for (let c = 1; fine && c < C; c++) lines += `M${c} 0V${R}`;
    map.ratio.forEach((v, i) => { if (fine && v === 0) strokes += `M${i % C} ${Math.floor(i / C) + 1}l1-1`; });
    svg.setAttribute("viewBox", `0 0 ${C} ${R}`);
    svg.querySelector(".lines").setAttribute("d", lines);
    svg.querySelector(".strokes").setAttribute("d", strokes);
    const frame = area.parentElement;
    frame.querySelector(".y").replaceChildren(...centred(map.rows, 16, "top"));
    frame.querySelector(".x").replaceChildren(...centred(map.columns, 9, "left"));
    frame.querySelector(".y-name").textContent = map.names[0];
    frame.querySelector(".x-name").textContent = map.names[1];
  };

  const heatReader = (area, current) => {
    const cursor = area.querySelector(".cursor"), output = byId(area.id + "-read");
    let [row, column] = [0, -1];
    const show = () => {
      const map = current(), [R, C] = [map.rows.length, map.columns.length];
      row = Math.min(Math.max(row, 0), R - 1);
      column = Math.min(Math.max(column, 0), C - 1);
      cursor.hidden = false;
      cursor.style.cssText = `left:${100 * column / C}%;top:${100 * row / R}%;width:${100 / C}%;height:${100 / R}%`;
      const count = map.n[row * C + column], ratio = map.ratio[row * C + column];
      const against = Number.isNaN(ratio) ? "" : `, ${ratio.toFixed(2)}× what was to be expected`;
      const [a, b, unit] = map.names;
      output.textContent = `${a} ${map.rows[row]}, ${b} ${map.columns[column]}: ${group(count)} ${unit}${against}`;
    };
    const at = (event) => {
      const map = current(), box = area.getBoundingClientRect();
      row = Math.floor((event.clientY - box.top) / box.height * map.rows.length);
      column = Math.floor((event.clientX - box.left) / box.width * map.columns.length);
      show();
    };
    const hide = () => { cursor.hidden = true; output.textContent = ""; };
    area.addEventListener("pointermove", at);
    area.addEventListener("pointerdown", at);
    area.addEventListener("pointerleave", () => { if (document.activeElement !== area) hide(); });
    area.addEventListener("blur", hide);
    area.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      row += move[0];
      column += move[1];
      show();
    });
  };

  const lineReader = (area, chart) => {
    const cursor = area.querySelector(".cursor"), output = byId(area.id + "-read");
    const xs = [...new Set(chart.series.flatMap((line) => line.x))].sort((a, b) => a - b);
    let place = -1;
    const show = () => {
      place = Math.min(Math.max(place, 0), xs.length - 1);
      const x = xs[place], [low, high] = chart.x;
      cursor.hidden = false;
      cursor.style.left = 100 * (x - low) / (high - low) + "%";
      const parts = chart.series.flatMap((line) => {
        let near = 0;
        line.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(line.x[near] - x)) near = i; });
        if (line.x[near] !== x) return [];
        const band = line.low.length ? ` (${short(line.low[near])} to ${short(line.high[near])})` : "";
        return [`${line.name} ${short(line.y[near])}${band}`];
      });
      output.textContent = `${chart.names[0]} ${short(x)}: ${parts.join(", ")}`;
    };
    const hide = () => { cursor.hidden = true; output.textContent = ""; };
    const at = (event) => {
      const box = area.getBoundingClientRect(), [low, high] = chart.x;
      const x = low + (event.clientX - box.left) / box.width * (high - low);
      place = xs.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(xs[best] - x) ? i : best), 0);
      show();
    };
    area.addEventListener("pointermove", at);
    area.addEventListener("pointerdown", at);
    area.addEventListener("pointerleave", () => { if (document.activeElement !== area) hide(); });
    area.addEventListener("blur", hide);
    area.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
      if (!move) return;
      event.preventDefault();
      place += move;
      show();
    });
  };

  // -- tokens: every layer's experts, coloured again when the layer changes ------------------------------------
  const tokenReader = (layers) => {
    const root = byId("tokens"), output = byId("tokens-read"), key = byId("tokens-key");
    const spans = [...root.querySelectorAll(".text span")];
    const firstIds = new Map();
    let layer = byId("tokens-choice").value, only = null, on = -1;
    const open = () => {
      const view = layers[layer];
      if (!view.list) { view.list = unpack(view.ids); view.parts = unpack(view.weights); }
      return view;
    };
    const expertsOf = (view, i) => view.list.slice(i * view.k, (i + 1) * view.k).map((id) => id - 1);
    const name = (view, id) => (id < view.experts ? `expert ${id}` : `null expert ${id}`);
    const paint = () => {
      const view = open(), counts = new Map();
      spans.forEach((_, i) => {
        const id = view.list[i * view.k] - 1;
        firstIds.set(i, id);
        if (id >= 0 && id < view.experts) counts.set(id, (counts.get(id) || 0) + 1);
      });
      const busy = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, 8);
      const colour = new Map(busy.map(([id], i) => [id, "t" + i]));
      spans.forEach((span, i) => {
        const id = firstIds.get(i);
        const uses = only === null || expertsOf(view, i).includes(only);
        const kind = only !== null && uses ? colour.get(only) : colour.get(id);
        span.className = (kind || (id < 0 || id >= view.experts ? "tn" : "tr")) + (uses ? "" : " dim") + (i === on ? " on" : "");
      });
      key.replaceChildren(...busy.map(([id, count], i) => {
        const button = document.createElement("button"), number = document.createElement("span");
        button.type = "button";
        button.className = "t" + i;
        button.dataset.expert = id;
        button.setAttribute("aria-pressed", String(only === id));
        number.textContent = group(count);
        button.append(`${id} `, number);
        return button;
      }));
    };
    const read = () => {
      const view = open();
      const found = expertsOf(view, on).flatMap((id, rank) =>
        id < 0 ? [] : [`${name(view, id)} (${(view.parts[on * view.k + rank] / 65535 * view.top).toFixed(3)})`]);
      output.textContent = `${spans[on].textContent.trim() || "space"} → ${found.join(", ") || "no expert"}`;
    };
    const focus = (place) => {
      if (on >= 0) spans[on].classList.remove("on");
      on = Math.min(Math.max(place, 0), spans.length - 1);
      spans[on].classList.add("on");
      read();
    };
    const indexOf = (event) => spans.indexOf(event.target);
    root.addEventListener("pointerover", (event) => { const i = indexOf(event); if (i >= 0) focus(i); });
    root.addEventListener("click", (event) => { const i = indexOf(event); if (i >= 0) focus(i); });
    root.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 }[event.key];
      if (!move) return;
      event.preventDefault();
      focus(on + move);
      spans[on].scrollIntoView({ block: "nearest" });
    });
    key.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const id = Number(button.dataset.expert);
      only = only === id ? null : id;
      paint();
      const again = key.querySelector(`[data-expert="${id}"]`);
      if (again) again.focus();
    });
    return (value) => { layer = value; only = null; paint(); if (on >= 0) read(); };
  };

  const changes = {};
  Object.entries(data.heat).forEach(([id, map]) => heatReader(byId(id), () => opened(map)));
  Object.entries(data.choosers).forEach(([id, chooser]) => {
    let chosen = chooser.first;
    const area = byId(id);
    heatReader(area, () => opened(chooser.maps[chosen]));
    changes[id] = (value) => { chosen = value; draw(area, opened(chooser.maps[value])); area.dispatchEvent(new Event("blur")); };
  });
  Object.entries(data.lines).forEach(([id, chart]) => { const area = byId(id); if (area) lineReader(area, chart); });
  if (data.tokens) changes.tokens = tokenReader(data.tokens);
  document.querySelectorAll("select[data-for]").forEach((select) =>
    select.addEventListener("change", () => changes[select.dataset.for](select.value)));
  document.querySelectorAll("button[data-step]").forEach((button) => button.addEventListener("click", () => {
    const select = byId(button.dataset.for + "-choice");
    select.selectedIndex = Math.min(Math.max(select.selectedIndex + Number(button.dataset.step), 0), select.length - 1);
    changes[select.dataset.for](select.value);
  }));
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
