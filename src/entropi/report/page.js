// The heads of all runs side by side: choose a measure, move through training, point at a head to read it.
// The page is complete without this script: the tables already hold the entropies of the last frame.
"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tables = Array.from(document.querySelectorAll("table.heat"));
  const controls = document.getElementById("controls");
  const tip = document.getElementById("tip");
  if (!tables.length || !controls) return;
  const measure = document.getElementById("measure");
  const slider = document.getElementById("step");
  const shown = document.getElementById("shown-step");
  const legend = document.getElementById("legend");
  const END = data.steps.length; // the place of the slider after the last step: the diagnosis

  const nats = { digits: 2, percent: false };
  const share = { digits: 0, percent: true };
  // How each measure is read from a frame and a pattern, and the scale it is drawn on.
  const MEASURES = {
    entropy: { of: (run, frame) => frame.entropy, top: (run) => run.maximum, unit: "nats", ...nats },
    share: { of: (run, frame) => scaled(frame.entropy, run.maximum), top: () => 1, unit: "of log T", ...share },
    distance: { of: (run) => run.pattern && run.pattern.distance, unit: "tokens back", digits: 1, still: true },
    on_first: { of: (run) => run.pattern && run.pattern.on_first, top: () => 1, unit: "of the weight", ...share, still: true },
    on_previous: { of: (run) => run.pattern && run.pattern.on_previous, top: () => 1, unit: "of the weight", ...share, still: true },
    on_itself: { of: (run) => run.pattern && run.pattern.on_itself, top: () => 1, unit: "of the weight", ...share, still: true },
    threshold: { of: (run, frame) => frame.threshold, top: () => 1, unit: "of E_max", digits: 2 },
    temperature: { of: (run, frame) => frame.temperature, unit: "", digits: 2 },
  };

  // The row of a matrix that a cell shows: not every layer of a model has attention.
  function rowOf(cell) {
    return cell.parentElement.sectionRowIndex;
  }

  function scaled(matrix, by) {
    return by && matrix && matrix.map((row) => row.map((value) => (value === null ? null : value / by)));
  }

  function frameOf(run) {
    const place = Number(slider.value);
    if (place >= END) return run.frames[run.frames.length - 1];
    const reached = run.frames.filter((frame) => !frame.end && frame.step <= data.steps[place]);
    return reached.length ? reached[reached.length - 1] : run.frames[0];
  }

  function spelt(value, how) {
    if (value === null || value === undefined) return "n/a";
    return how.percent ? (100 * value).toFixed(how.digits) + " %" : value.toFixed(how.digits);
  }

  function paint(cell, value, low, high) {
    const known = value !== null && value !== undefined;
    const place = known && high > low ? Math.min(Math.max((value - low) / (high - low), 0), 1) : 0;
    const index = Math.round(place * (data.colours.length - 1));
    cell.style.backgroundColor = known ? data.colours[index] : data.missing;
    cell.style.color = known ? data.inks[index] : "#000000";
  }

  function range(how, matrices) {
    const values = matrices.flat(2).filter((value) => value !== null && value !== undefined);
    const tops = how.top ? data.runs.map(how.top).filter((value) => value) : [];
    return [0, tops.length ? Math.max(...tops) : Math.max(...values, 0) || 1];
  }

  function draw() {
    const how = MEASURES[measure.value];
    const chosen = data.runs.map((run) => (run.frames.length ? how.of(run, frameOf(run)) : null));
    // A scale that does not move with the slider, so that colours can be compared.
    const all = how.still ? chosen : data.runs.flatMap((run) => run.frames.map((frame) => how.of(run, frame)));
    const [low, high] = range(how, all.filter(Boolean));
    tables.forEach((table) => {
      const index = Number(table.dataset.run);
      const run = data.runs[index];
      const matrix = chosen[index];
      table.querySelectorAll("td").forEach((cell) => {
        const value = matrix ? matrix[rowOf(cell)][cell.dataset.head] : null;
        cell.firstElementChild.textContent = spelt(value, how);
        paint(cell, value, low, high);
      });
      const what = how.still ? "held-out text, at the end" : frameOf(run).label;
      table.querySelector(".frame").textContent = matrix ? what : "not recorded in this run";
    });
    legend.querySelector(".low").textContent = spelt(low, how);
    legend.querySelector(".high").textContent = spelt(high, how) + (how.unit ? " " + how.unit : "");
    const place = Number(slider.value);
    const text = place >= END ? "end of training" : "step " + data.steps[place].toLocaleString("en");
    shown.textContent = how.still ? "measured at the end only" : text;
    slider.setAttribute("aria-valuetext", text);
    slider.disabled = Boolean(how.still);
    if (current) describe(current);
  }

  let current = null;

  function line(text, strong) {
    const element = document.createElement(strong ? "strong" : "div");
    element.textContent = text;
    tip.append(element);
  }

  function describe(cell) {
    current = cell;
    const run = data.runs[Number(cell.closest("table").dataset.run)];
    const frame = frameOf(run);
    const [row, head] = [rowOf(cell), cell.dataset.head];
    const entropy = frame.entropy[row][head];
    tip.replaceChildren();
    line("Layer " + cell.dataset.layer + ", head " + head, true);
    line(frame.label);
    if (entropy === null) {
      line("entropy not finite");
    } else {
      line("entropy " + entropy.toFixed(3) + " nats");
      if (run.maximum) {
        const parts = [spelt(entropy / run.maximum, share) + " of log T", spelt(entropy / run.ceiling, share) + " of what a causal mask allows"];
        line(parts.join(", "));
      }
      const largest = Math.max(...frame.entropy.flat().filter((value) => value !== null));
      const quarter = largest > 0 ? Math.min(Math.floor((4 * entropy) / largest), 3) : 0;
      line(["lowest quarter of M: collapsed", "second quarter of M", "third quarter of M", "top quarter of M: overloaded"][quarter]);
    }
    if (frame.threshold) line("threshold θ " + spelt(frame.threshold[row][head], nats));
    if (frame.temperature) line("temperature " + spelt(frame.temperature[row][head], nats));
    if (run.pattern) {
      const at = (name) => run.pattern[name][row][head];
      line("looks " + spelt(at("distance"), { digits: 1 }) + " tokens back on average (even attention: " + run.pattern.even_distance + ")");
      line("first token " + spelt(at("on_first"), share) + ", previous " + spelt(at("on_previous"), share) + ", itself " + spelt(at("on_itself"), share) + " of the weight (even: " + spelt(run.pattern.even_share, share) + " each)");
    } else {
      line("where it looks is not recorded");
    }
    tip.hidden = false;
    const box = cell.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const left = Math.min(Math.max(box.left + box.width / 2 - size.width / 2, 8), window.innerWidth - size.width - 8);
    const below = box.bottom + 8 + size.height <= window.innerHeight;
    tip.style.left = Math.max(left, 8) + "px";
    tip.style.top = (below ? box.bottom + 8 : Math.max(box.top - size.height - 8, 8)) + "px";
    cell.setAttribute("aria-describedby", "tip");
  }

  function hide() {
    if (current) current.removeAttribute("aria-describedby");
    current = null;
    tip.hidden = true;
  }

  function move(cell, key) {
    const table = cell.closest("table");
    const [row, head] = [rowOf(cell), Number(cell.dataset.head)];
    const rows = table.tBodies[0].rows;
    const last = (place) => rows[place].cells.length - 2; // the first cell of a row is its heading
    const to = {
      ArrowUp: [row - 1, head], ArrowDown: [row + 1, head],
      ArrowLeft: [row, head - 1], ArrowRight: [row, head + 1],
      Home: [row, 0], End: [row, last(row)],
    }[key];
    if (!to || to[0] < 0 || to[0] >= rows.length || to[1] < 0) return Boolean(to);
    if (to[1] > last(to[0])) {
      if (to[0] === row) return true;
      to[1] = last(to[0]); // layers may differ in their number of heads
    }
    const next = rows[to[0]].cells[to[1] + 1];
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    return true;
  }

  tables.forEach((table) => {
    table.setAttribute("role", "grid");
    table.querySelector("td").tabIndex = 0;
    table.addEventListener("mouseover", (event) => {
      const cell = event.target.closest("td");
      if (cell && cell !== current) { hide(); describe(cell); }
    });
    table.addEventListener("mouseleave", () => {
      hide();
      if (table.contains(document.activeElement) && document.activeElement.matches("td:focus-visible")) describe(document.activeElement);
    });
    table.addEventListener("focusin", (event) => { hide(); describe(event.target.closest("td")); });
    table.addEventListener("focusout", hide);
    table.addEventListener("click", (event) => {
      const cell = event.target.closest("td");
      if (!cell) return;
      table.querySelectorAll('td[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
      cell.tabIndex = 0;
      cell.focus();
    });
    table.addEventListener("keydown", (event) => {
      const cell = event.target.closest("td");
      if (event.key === "Escape") hide();
      else if (cell && move(cell, event.key)) event.preventDefault();
    });
  });
  window.addEventListener("scroll", () => { if (current && !current.matches(":focus")) hide(); }, { passive: true });

  const has = (name) => data.runs.some((run) => run.frames.some((frame) => MEASURES[name].of(run, frame)));
  Array.from(measure.options).forEach((option) => { if (!has(option.value)) option.remove(); });
  document.getElementById("moments").hidden = END === 0; // nothing but a diagnosis
  slider.max = String(END);
  slider.value = String(END);
  measure.addEventListener("change", draw);
  slider.addEventListener("input", draw);
  legend.querySelector(".bar").style.background = "linear-gradient(to right, " + data.colours.join(", ") + ")";
  controls.hidden = false;
  draw();
})();
