"""The style of reports: light, dark, on a phone and in print."""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --quiet: #5b6270; --paper: #fafaf8; --card: #fff; --hair: #e3e5e8;
  --accent: #005a94; --wash: #eef5fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --quiet: #a2a9b6; --paper: #14171c; --card: #1b1f26;
  --hair: #303640; --accent: #7cc4f2; --wash: #1d2c38; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
header { margin-bottom: 2.5rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; letter-spacing: -.005em; margin: 3rem 0 .35rem; }
p { margin: .35rem 0 1rem; max-width: 46rem; }
.quiet, figcaption, td small, th small { color: var(--quiet); }
.lead { font-size: 1.1rem; }
.lead b { color: var(--accent); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--hair); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .8rem; text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); white-space: normal;
  min-width: 6.5rem; }
thead th { font-size: .85rem; font-weight: 600; color: var(--quiet); border-bottom: 1px solid var(--hair); }
tbody th { font-weight: 600; }
tbody tr + tr > * { border-top: 1px solid var(--hair); }
td small, th small { display: block; font-size: .76rem; font-weight: 400; line-height: 1.3; }
td.best { background: var(--wash); }
td.best b { color: var(--accent); }
.std { color: var(--quiet); font-size: .86em; }
tr.floor > * { border-top: 2px solid var(--hair); font-style: italic; color: var(--quiet); font-weight: 400; }
figure { margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1.25rem;
  margin-top: 1.25rem; }
.plot { background: #fff; border: 1px solid var(--hair); border-radius: 10px; padding: .9rem; }
.plot img { display: block; width: 100%; height: auto; }
figcaption { font-size: .88rem; margin-top: .5rem; max-width: 46rem; }
.samples td, .samples th { text-align: left; padding: .6rem .45rem; }
.samples th:first-child { padding-left: .9rem; vertical-align: middle; }
.samples td:last-child { padding-right: .9rem; }
.samples img { display: block; width: 100%; min-width: 132px; max-width: 260px; height: auto; border-radius: 6px;
  background: #fff; image-rendering: pixelated; }
.baselines td, .baselines tbody th { vertical-align: middle; }
.baselines img { display: block; margin-left: auto; width: 132px; height: auto; border-radius: 6px; background: #fff;
  image-rendering: pixelated; }
.samples small { margin-top: .3rem; }
ul { padding-left: 1.2rem; max-width: 46rem; }
details { margin-top: 3rem; border-top: 1px solid var(--hair); padding-top: 1rem; }
summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.5rem; margin: 1rem 0 0; font-size: .92rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .92em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 600px) { main { padding: 1.75rem 1rem 3rem; } th, td { padding: .5rem .65rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; } .plot { padding: .4rem; }
  th:first-child { min-width: 6.6rem; max-width: 8rem; overflow-wrap: break-word; }
  .samples img { min-width: 118px; } }
@media print { :root { color-scheme: light; --ink: #000; --quiet: #444; --paper: #fff; --card: #fff; --hair: #ccc;
  --accent: #003f6b; --wash: #eef3f7; } body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  .scroll { overflow: visible; } th:first-child { position: static; } th, td { padding: .3rem .4rem; }
  .plots { grid-template-columns: 1fr 1fr; } tr, figure { break-inside: avoid; }
  h2 { break-after: avoid; } .samples img { min-width: 0; }
  details::details-content { display: block; content-visibility: visible; block-size: auto; } }
"""
