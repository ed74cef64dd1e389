"""The page's style sheet: system fonts, light and dark, phone and paper."""

STYLE_SHEET = """
:root {
  color-scheme: light dark;
  --ground: #f4f5f3; --paper: #ffffff; --ink: #1c2733; --muted: #5d6975; --rule: #dde2e8; --soft: #eef1f4;
  --dot: #9aa5b1; --blue: #0072b2; --orange: #d55e00; --green: #00835f; --sky: #4da6d9; --navy: #0b3c5d;
  --gold: #e6a100; --accent: #00629b;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #11161b; --paper: #1a2129; --ink: #e6eaee; --muted: #9aa7b4; --rule: #313b46; --soft: #232c36;
    --dot: #66727f; --blue: #56b4e9; --orange: #f08a3c; --green: #35c29a; --sky: #3f88b5; --navy: #c3e4f7;
    --gold: #f2c14e; --accent: #7cc4f0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.6 var(--sans);
  font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 1140px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 56px; }
h1 {
  font: 600 clamp(2rem, 5vw, 3.1rem)/1.1 var(--serif); letter-spacing: -.012em; margin: 6px 0 18px;
  text-wrap: balance;
}
h2 { font: 600 1.55rem/1.25 var(--serif); margin: 0 0 6px; letter-spacing: -.005em; }
h3 { font: 600 1rem/1.4 var(--sans); margin: 26px 0 6px; }
p { margin: 0 0 14px; max-width: 74ch; text-wrap: pretty; }
a { color: var(--accent); text-underline-offset: 2px; text-decoration-thickness: 1px; }
code, pre { font-family: var(--mono); font-size: .86em; }
.overline { color: var(--muted); font-size: .9rem; margin: 0; overflow-wrap: anywhere; }
.lede { font-size: 1.18rem; line-height: 1.55; max-width: 68ch; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 22px 0 0; font-size: .93rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px; margin: 26px 0 0; }
.card, section { background: var(--paper); border: 1px solid var(--rule); border-radius: 10px; }
.card { padding: 16px 18px 15px; display: flex; flex-direction: column; }
.card b { font: 600 2.05rem/1.15 var(--serif); letter-spacing: -.01em; white-space: nowrap; }
.card b small { font-size: .52em; font-weight: 400; color: var(--muted); margin-left: .15em; letter-spacing: 0; }
.card .what { font-size: .93rem; font-weight: 600; margin-top: 4px; line-height: 1.35; }
.card .how { font-size: .84rem; line-height: 1.4; color: var(--muted); margin-top: 3px; }
.card.first { border-top: 3px solid var(--gold); padding-top: 14px; }
section { margin: 22px 0 0; padding: 28px 28px 26px; scroll-margin-top: 12px; }
.caption { color: var(--muted); font-size: .92rem; line-height: 1.55; max-width: 88ch; margin: 10px 0 0; }
.scroll {
  overflow-x: auto; margin: 14px -8px 0; padding: 0 8px;
  background: /* a shadow at each edge that hides something; what moves with the content covers it at the ends */
    linear-gradient(to right, var(--paper) 40%, transparent) left / 40px 100% no-repeat local,
    linear-gradient(to left, var(--paper) 40%, transparent) right / 40px 100% no-repeat local,
    linear-gradient(to right, var(--dot), transparent) left / 12px 100% no-repeat scroll,
    linear-gradient(to left, var(--dot), transparent) right / 12px 100% no-repeat scroll;
}
.figure svg [id$="-patch_1"] path { fill: none !important; } /* the figure's ground: it would hide the shadow */
.figure svg { display: block; width: 100%; height: auto; min-width: 560px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; line-height: 1.35; }
th, td { padding: 9px 8px; text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; color: var(--muted); font-size: .84rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
th.left, td.left { text-align: left; }
thead tr.groups th { border-bottom: 0; padding-bottom: 0; text-align: left; color: var(--ink); }
.rangy { display: block; color: var(--muted); font-size: .78rem; white-space: nowrap; }
td.strong { font-weight: 650; font-size: 1.02rem; }
td.strong .rangy { font-weight: 400; }
td.quiet { color: var(--muted); font-size: .84rem; }
td.edge, th.edge { border-left: 1px solid var(--rule); padding-left: 13px; }
td.files { white-space: nowrap; font-size: .86rem; }
td.files a + a { margin-left: .55em; }
td.nowrap, th.nowrap { white-space: nowrap; }
tr.best td:first-child::after { content: " ★"; color: var(--gold); }
tr.reference td { color: var(--muted); }
tr.reference td:first-child { font-style: italic; }
.bar { display: block; height: 9px; border-radius: 2px; background: var(--blue); min-width: 2px; }
td.bars { width: 42%; vertical-align: middle; }
dl { display: grid; grid-template-columns: minmax(130px, 190px) 1fr; gap: 9px 20px; margin: 14px 0 0; }
dt { color: var(--muted); font-size: .92rem; }
dd { margin: 0; overflow-wrap: anywhere; max-width: 78ch; }
.verdict { border-left: 3px solid var(--blue); padding: 2px 0 2px 16px; margin: 18px 0 4px; max-width: 80ch; }
details { margin-top: 16px; }
summary { cursor: pointer; font-weight: 600; font-size: .94rem; }
pre {
  background: var(--soft); border-radius: 8px; padding: 14px 16px; overflow: auto; max-height: 480px; line-height: 1.5;
}
.checksum { font-family: var(--mono); font-size: .8rem; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: .88rem; padding-top: 22px; padding-bottom: 48px; }
@media (max-width: 640px) {
  main, header, footer { padding-left: 14px; padding-right: 14px; }
  header { padding-top: 30px; }
  section { padding: 20px 16px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 10px; }
  .card { padding: 12px 13px; }
  .card b { font-size: 1.6rem; }
  .scroll { margin: 14px 0 0; border: 1px solid var(--dot); border-radius: 8px; }
  dl { grid-template-columns: 1fr; gap: 1px; }
  dd { margin-bottom: 10px; }
  table.students th:first-child, table.students td:first-child {
    position: sticky; left: 0; background: var(--paper); padding-right: 12px;
  }
}
@media print {
  :root {
    --ground: #fff; --paper: #fff; --ink: #1c2733; --muted: #5d6975; --rule: #d5dae0; --soft: #f4f5f6; --dot: #9aa5b1;
    --blue: #0072b2; --orange: #d55e00; --green: #00835f; --sky: #4da6d9; --navy: #0b3c5d; --gold: #e6a100;
    --accent: #1c2733;
  }
  body { font-size: 10.5pt; }
  nav, details { display: none; }
  main, header, footer { max-width: none; padding: 0; }
  section { border: 0; padding: 8px 0; }
  .card, .figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; margin: 10px 0 0; padding: 0; border: 0; background: none; }
  .figure svg { min-width: 0; }
  table { font-size: 8.5pt; }
  th, td { padding: 5px 6px; }
}
"""
