"use strict";
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const SVG = "http://www.w3.org/2000/svg";

// Light or dark: as the system says (set in the head, before anything is painted), until the reader says otherwise.
const system = matchMedia("(prefers-color-scheme: dark)");
const setTheme = (theme) => { document.documentElement.dataset.theme = theme; };
system.addEventListener("change", () => setTheme(system.matches ? "dark" : "light"));
const themeButton = document.querySelector(".theme");
themeButton.hidden = false;
themeButton.onclick = () =>
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

// Clips: silent, all together and in a loop; a click gives one of them its sound.
const frames = all(".frame");
const videos = frames.map((frame) => frame.querySelector("video"));
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const visible = new Set();
let playing = !still;

const run = (video) => {
  if (playing && visible.has(video)) video.play().catch(() => {}); // the browser may refuse
  else video.pause();
};
const hear = (frame) => {
  frames.forEach((other) => {
    const audible = other === frame && !other.classList.contains("audible");
    other.classList.toggle("audible", audible);
    other.querySelector("video").muted = !audible;
    if (audible) {
      const video = other.querySelector("video");
      video.currentTime = 0;
      video.play().catch(() => {});
    }
  });
};
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    visible[isIntersecting ? "add" : "delete"](target);
    run(target);
  }
});

frames.forEach((frame) => {
  const video = frame.querySelector("video");
  video.removeAttribute("controls");
  frame.tabIndex = 0;
  frame.setAttribute("role", "button");
  frame.setAttribute("aria-label", `Sound of ${video.getAttribute("aria-label")}`);
  frame.insertAdjacentHTML("beforeend",
    `<svg class="sound" viewBox="0 0 16 16" aria-hidden="true"><path d="M2 6h2.5L8 3v10l-3.5-3H2z"/>` +
    `<path class="cross" d="M11 6l3.5 4M14.5 6l-3.5 4"/><path class="waves" d="M10.5 6a3 3 0 010 4M12.6 4a6 6 0 010 8"/></svg>` +
    `<span class="played"></span>`);
  const sized = () => frame.classList.toggle("tiny", video.videoWidth < 200);
  video.readyState ? sized() : video.addEventListener("loadedmetadata", sized);
  video.addEventListener("timeupdate", () => {
    frame.querySelector(".played").style.width = `${(100 * video.currentTime) / video.duration}%`;
  });
  frame.onclick = () => hear(frame);
  frame.onkeydown = (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); hear(frame); }
  };
  watcher.observe(video);
});

const actions = {
  play: (button) => {
    playing = !playing;
    button.textContent = playing ? "Pause" : "Play";
    videos.forEach(run);
  },
  restart: () => videos.forEach((video) => { video.currentTime = 0; run(video); }),
  slow: (button) => videos.forEach((video) => { video.playbackRate = pressed(button) ? 0.5 : 1; }),
  loop: (button) => videos.forEach((video) => { video.loop = pressed(button); }),
  smooth: (button) => document.body.classList.toggle("smooth", pressed(button)),
};
const pressed = (button) => button.getAttribute("aria-pressed") === "true";
all(".tools").forEach((tools) => { tools.hidden = false; });
all(".tools button").forEach((button) => {
  if (button.dataset.do === "play") button.textContent = playing ? "Pause" : "Play";
  button.onclick = () => {
    if (button.hasAttribute("aria-pressed")) button.setAttribute("aria-pressed", !pressed(button));
    actions[button.dataset.do](button);
  };
});

// Charts: the numbers under the pointer.
const place = (value, [low, high, start, end, log]) => {
  if (log) [low, high, value] = [low, high, Math.max(value, low)].map(Math.log10);
  return start + ((value - low) / (high - low)) * (end - start);
};
const nearest = (steps, step) =>
  steps.reduce((best, s, n) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? n : best), 0);

all(".chart").forEach((chart) => {
  const { x, y, series } = JSON.parse(chart.dataset.chart);
  const picture = chart.querySelector("svg");
  const cursor = picture.querySelector(".cursor");
  const piled = chart.classList.contains("piled");
  const draw = (name, attributes) => {
    const mark = document.createElementNS(SVG, name);
    Object.entries(attributes).forEach(([key, value]) => mark.setAttribute(key, value));
    cursor.append(mark);
  };
  const clear = () => { cursor.replaceChildren(); chart.querySelector(".tip")?.remove(); };
  picture.onpointerleave = clear;
  picture.onpointermove = (event) => {
    clear();
    const box = picture.getBoundingClientRect();
    const across = (event.clientX - box.left) * (picture.viewBox.baseVal.width / box.width);
    const asked = x[0] + ((across - x[2]) / (x[3] - x[2])) * (x[1] - x[0]);
    if (asked < x[0] || asked > x[1]) return;
    const tip = document.createElement("div");
    tip.className = "tip";
    const found = series.map((one) => ({ one, n: nearest(one.steps, asked) }));
    const step = found.map(({ one, n }) => one.steps[n])
      .reduce((a, b) => (Math.abs(b - asked) < Math.abs(a - asked) ? b : a));
    draw("line", { x1: place(step, x), x2: place(step, x), y1: y[3], y2: y[2] });
    tip.append(`step ${step.toLocaleString("en")}`);
    for (const { one, n } of found) {
      const far = Math.abs(one.steps[n] - step) > (x[1] - x[0]) / 20;
      if (far) continue; // this line has no value here
      if (!piled) draw("circle", { cx: place(one.steps[n], x), cy: place(one.values[n], y), r: 3.5,
        style: `fill:var(--${one.color})` });
      const row = document.createElement("div");
      const dot = document.createElement("i");
      dot.style.setProperty("--c", `var(--${one.color})`);
      const label = document.createElement("em");
      label.textContent = ` ${one.label}`;
      row.append(dot, piled ? `${(100 * one.values[n]).toFixed(0)} %` : one.values[n].toPrecision(4), label);
      tip.append(row);
    }
    chart.append(tip);
    const outer = chart.getBoundingClientRect();
    const left = event.clientX - outer.left + 14;
    const fits = left + tip.offsetWidth < outer.width + 40;
    tip.style.left = `${fits ? left : left - tip.offsetWidth - 28}px`;
    tip.style.top = `${box.top - outer.top + 8}px`;
  };
});
