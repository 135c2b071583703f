"use strict";
// Without this script the report shows the same, but for what answers to the pointer.

const labels = JSON.parse(document.getElementById("labels").textContent);
const tip = document.getElementById("tip");

function pick(row) {
  document.body.classList.toggle("picking", row !== null);
  for (const old of document.querySelectorAll(".picked")) old.classList.remove("picked");
  if (row === null) return;
  for (const part of document.querySelectorAll(`[data-row="${row}"]`)) part.classList.add("picked");
}

// The places that can be pointed at, in the SVG's own units.
function placesOf(svg) {
  const places = [];
  for (const group of svg.querySelectorAll("[data-kind=curve] path")) {
    const numbers = group.getAttribute("d").match(/-?[\d.]+(?:e-?\d+)?/g).map(Number);
    const row = group.closest("[data-row]").dataset.row;
    for (let i = 0; i + 1 < numbers.length; i += 2) places.push([row, numbers[i], numbers[i + 1]]);
  }
  for (const point of svg.querySelectorAll("[data-kind=point] use")) {
    const row = point.closest("[data-row]").dataset.row;
    places.push([row, Number(point.getAttribute("x")), Number(point.getAttribute("y"))]);
  }
  return places;
}

function nearest(places, panel, x, y) {
  let found = null, least = 30 ** 2; // points; further away nothing is meant
  for (const place of places) {
    const [, px, py] = place;
    if (px < panel.left - 1 || px > panel.right + 1 || py < panel.top - 1 || py > panel.bottom + 1)
      continue;
    const distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance < least) [found, least] = [place, distance];
  }
  return found;
}

function number(value) {
  return String(Number(value.toPrecision(4)));
}

function describe(panel, [row, px, py]) {
  const x = (px - panel.left) / (panel.right - panel.left) * (panel.x[1] - panel.x[0]) + panel.x[0];
  const y = (panel.bottom - py) / (panel.bottom - panel.top) * (panel.y[1] - panel.y[0]) + panel.y[0];
  const name = panel.ylabel || panel.title;
  return `${labels[row]}\n${panel.xlabel}: ${number(x)}\n${name}: ${number(y)}`;
}

function show(text, event) {
  tip.hidden = text === null;
  if (text === null) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - box.width - 4);
  const top = Math.min(event.clientY + 14, innerHeight - box.height - 4);
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

for (const svg of document.querySelectorAll("svg[data-panels]")) {
  const panels = JSON.parse(svg.dataset.panels), places = placesOf(svg);
  svg.addEventListener("pointermove", (event) => {
    const label = event.target.closest("[data-kind=label]");
    const at = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(svg.getScreenCTM().inverse());
    const panel = panels.find((p) =>
      p.left <= at.x && at.x <= p.right && p.top <= at.y && at.y <= p.bottom);
    const place = panel ? nearest(places, panel, at.x, at.y) : null;
    pick(place ? place[0] : !panel && label ? label.dataset.row : null);
    show(place ? describe(panel, place) : null, event);
  });
  svg.addEventListener("pointerleave", () => { pick(null); tip.hidden = true; });
}

for (const row of document.querySelectorAll("tbody tr")) {
  row.addEventListener("pointerenter", () => pick(row.dataset.row));
  row.addEventListener("pointerleave", () => pick(null));
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement, body = heading.closest("table").tBodies[0];
    const column = heading.cellIndex, falling = heading.ariaSort !== "descending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.ariaSort = falling ? "descending" : "ascending";
    const key = (row) => row.cells[column].dataset.value;
    const order = (a, b) => column ? key(a) - key(b) : key(b).localeCompare(key(a));
    const sorted = [...body.rows].sort((a, b) => falling ? order(b, a) : order(a, b));
    body.append(...sorted);
  });
}

const slider = document.querySelector(".slider input");
if (slider) {
  const steps = JSON.parse(slider.dataset.steps), said = document.querySelector(".slider output");
  slider.addEventListener("input", () => {
    const step = steps[slider.value];
    said.textContent = `iteration ${step}`;
    for (const figure of document.querySelectorAll("figure[data-steps]")) {
      const images = [...figure.querySelectorAll("img")];
      const there = images.filter((image) => Number(image.dataset.step) <= step);
      const shown = there.at(-1) ?? images[0];
      for (const image of images) image.hidden = image !== shown;
    }
  });
}
