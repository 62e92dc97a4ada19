// Shows two panels of a report's sample table at a time; without it the whole table is visible. Marks tables that scroll.
"use strict";
for (const section of document.querySelectorAll("section.explorer")) {
  const slider = section.querySelector("input[type=range]");
  const budgets = slider.dataset.values.split(" ");
  const ticks = section.querySelectorAll(".ticks span");
  const table = section.querySelector("details.panels");
  const shape = table.querySelector("img");
  const cells = new Map();
  for (const cell of section.querySelectorAll("td[data-panel]")) cells.set(cell.dataset.panel, cell);

  const setText = (element, text) => { if (element.textContent !== text) element.textContent = text; };

  const showPane = (pane) => {
    const row = pane.querySelector("select").value;
    const cell = cells.get(row + " *") ?? cells.get(row + " " + slider.value);
    const source = cell.querySelector("img");
    const image = pane.querySelector("img");
    image.hidden = source === null;
    const missing = pane.querySelector(".missing");
    missing.hidden = source !== null;
    if (source !== null) {
      image.src = source.src;
      image.alt = source.alt;
    } else if (shape.naturalHeight > 0) {
      missing.style.aspectRatio = shape.naturalWidth + " / " + shape.naturalHeight;
    }
    setText(pane.querySelector("figcaption"), cell.querySelector("small").textContent);
    const classes = cell.querySelector(".classes");
    setText(pane.querySelector(".classes"), classes === null ? "" : "classes, row by row: " + classes.textContent);
  };

  const show = () => {
    const budget = budgets[Number(slider.value)];
    slider.setAttribute("aria-valuetext", budget + " evaluations");
    setText(section.querySelector(".budget b"), budget + " NFE");
    ticks.forEach((tick, index) => tick.classList.toggle("chosen", index === Number(slider.value)));
    section.querySelectorAll(".pane").forEach(showPane);
  };

  section.addEventListener("input", show);
  section.querySelector(".chooser").hidden = false;
  table.open = false;
  show();
}

const scrolls = document.querySelectorAll(".scroll");
const mark = (box) => box.parentElement.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
const markAll = () => scrolls.forEach(mark);
scrolls.forEach((box) => box.addEventListener("scroll", () => mark(box), { passive: true }));
addEventListener("resize", markAll);
document.addEventListener("toggle", markAll, true);
markAll();

const opened = new Map();
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) { opened.set(details, details.open); details.open = true; }
});
addEventListener("afterprint", () => opened.forEach((open, details) => { details.open = open; }));
