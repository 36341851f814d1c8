"use strict";
// Legends that hide a series, and values read off a plot by pointer or arrow keys. The page says everything without this.
function wire(root) {
  const held = JSON.parse(root.querySelector("#figures").textContent);
  const short = (v) => (v === null ? "–" : Math.abs(v) >= 1e4 ? v.toPrecision(4) : String(+v.toPrecision(4)));
  for (const box of root.querySelectorAll(".plot")) {
    const figure = box.parentElement;
    for (const button of figure.querySelectorAll(".legend button")) {
      button.addEventListener("click", () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(on));
        for (const g of box.querySelectorAll(`g[data-s="${button.dataset.s}"]`)) g.classList.toggle("off", !on);
      });
    }
    const plot = held[box.dataset.plot];
    const out = box.querySelector("output");
    if (!plot || !out) continue;
    const round = (v) => (plot.names.length ? Math.round(v) : v);
    const places = [...new Set(plot.marks.flatMap((m) => m.x).filter((v) => v !== null).map(round))].sort((a, b) => a - b);
    let k = -1;
    const shown = () => [...box.querySelectorAll("svg")].find((s) => s.getBoundingClientRect().width > 0);
    const axis = (svg) => {
      const [low, high, start, end, log] = svg.dataset.x.split(" ").map(Number);
      return {
        to: (v) => start + ((end - start) * (log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low))),
        from: (p) => {
          const s = Math.min(1, Math.max(0, (p - start) / (end - start)));
          return log ? low * (high / low) ** s : low + s * (high - low);
        },
      };
    };
    const nearest = (values, v) => {
      let best = 0;
      values.forEach((x, i) => {
        if (x !== null && Math.abs(x - v) < Math.abs((values[best] ?? Infinity) - v)) best = i;
      });
      return best;
    };
    const read = () => {
      const v = places[k];
      const said = [];
      for (const [n, m] of plot.marks.entries()) {
        const button = figure.querySelector(`.legend button[data-s="${n}"]`);
        if (button && button.getAttribute("aria-pressed") === "false") continue;
        const i = nearest(m.x, v);
        if (plot.names.length && round(m.x[i]) !== v) continue;
        said.push(`${m.name} ${short(m.y[i])}`);
      }
      out.textContent = `${plot.names.length ? plot.names[v] : `${plot.x} ${short(v)}`}: ${said.join("; ")}`;
      for (const svg of box.querySelectorAll("svg")) {
        const line = svg.querySelector(".cursor");
        const [top, bottom] = svg.dataset.y.split(" ");
        const at = axis(svg).to(v);
        line.setAttribute("x1", at);
        line.setAttribute("x2", at);
        line.setAttribute("y1", top);
        line.setAttribute("y2", bottom);
        line.setAttribute("visibility", "visible");
      }
    };
    box.addEventListener("pointermove", (event) => {
      const svg = shown();
      const frame = svg.getBoundingClientRect();
      const at = ((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
      k = nearest(places, round(axis(svg).from(at)));
      read();
    });
    box.addEventListener("keydown", (event) => {
      const step = Math.max(1, Math.round(places.length / 40));
      const moves = { ArrowRight: k + step, ArrowLeft: k < 0 ? places.length - 1 : k - step, Home: 0, End: places.length - 1 };
      if (!(event.key in moves) || !places.length) return;
      event.preventDefault();
      k = Math.min(places.length - 1, Math.max(0, moves[event.key]));
      read();
    });
  }
}
wire(document);
// A page of the local server that changes: ask again, later the longer the answer took.
const live = document.querySelector("main[data-live]");
if (live) {
  const again = async () => {
    const began = performance.now();
    let more = true;
    try {
      if (document.hidden) throw new Error("nobody looks");
      const answer = await fetch(live.dataset.live, { headers: { Accept: "text/html" } });
      const ended = answer.headers.get("X-Live") === "ended";
      if (answer.ok || ended) {
        const text = await answer.text();
        const busy = live.contains(document.activeElement) || !document.getSelection().isCollapsed;
        if (!busy || ended) {
          const open = [...live.querySelectorAll("details[open]")].map((d) => d.querySelector("summary").textContent);
          live.innerHTML = text;
          for (const d of live.querySelectorAll("details")) d.open = open.includes(d.querySelector("summary").textContent);
          wire(live);
        }
        more = !ended;
      }
    } catch {
      // Nobody looks, or the server is away; ask again later.
    }
    if (more) setTimeout(again, Math.max(2000, 5 * (performance.now() - began)));
  };
  setTimeout(again, 2000);
}
