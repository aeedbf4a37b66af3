"""The report's style sheet."""

CSS = """
:root { color-scheme: light dark; --ground: #f7f7f5; --card: #ffffff; --ink: #1d1f22;
  --soft: #61666d; --line: #dfe1e4; --response: #c2374b; --mention: #b87503; --recall: #157a6e;
  --yes: #d3efdc; --yes-ink: #14532d; --no: #fbd5d5; --no-ink: #7f1d1d; --mid: #fdf0c8;
  --mid-ink: #6b4e00; --focus: #1f5fbf;
  --k0: #7a4fc9; --k1: #157a6e; --k2: #c2374b; --k3: #b87503; --k4: #1f5fbf; --k5: #61666d; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171a; --card: #1e2125; --ink: #e9eaec;
  --soft: #9ba1a9; --line: #34383e; --response: #ff8593; --mention: #f2b44c; --recall: #5fd0c0;
  --yes: #143d26; --yes-ink: #a9e8c0; --no: #4d1b1f; --no-ink: #ffb9bd; --mid: #453a12;
  --mid-ink: #f6dd8c; --focus: #8ab8ff;
  --k0: #b79cf2; --k1: #5fd0c0; --k2: #ff8593; --k3: #f2b44c; --k4: #8ab8ff; --k5: #9ba1a9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft, figcaption, th { color: var(--soft); }
.small { font-size: .85rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0; }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-weight: 650; }
.wide { overflow-x: auto; }
figure + .wide { margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .9rem; }
th { font-weight: 500; text-align: left; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
td:first-child { white-space: nowrap; }
th { vertical-align: bottom; }
tr.chosen td { font-weight: 650; }
figure { margin: 0; }
svg { display: block; width: 100%; min-width: 36rem; height: auto; }
svg text { font: 13px system-ui, sans-serif; fill: var(--soft); }
svg .grid { stroke: var(--line); }
svg .response { --c: var(--response); } svg .mention { --c: var(--mention); }
svg .recall { --c: var(--recall); }
svg polyline { fill: none; stroke: var(--c); stroke-width: 2.5; stroke-linejoin: round; }
svg .recall polyline { stroke-dasharray: 7 5; }
svg circle { fill: var(--c); stroke: var(--card); stroke-width: 2; }
svg .label { fill: var(--c); font-weight: 600; }
details { margin: .75rem 0; }
summary { cursor: pointer; font-weight: 600; }
.example { display: grid; grid-template-columns: minmax(8rem, 15rem) minmax(0, 1fr); gap: 1.25rem;
  margin: 1rem 0; }
.example img { width: 100%; height: auto; border-radius: .4rem; display: block; background: var(--line); }
img.drawn { image-rendering: pixelated; }
.text { overflow-wrap: anywhere; white-space: pre-wrap; unicode-bidi: isolate; margin: .2rem 0; }
.answer { border-left: .25rem solid var(--line); padding: .1rem 0 .1rem .75rem; margin: .6rem 0; }
.answer.chosen { border-color: var(--recall); } .answer.rejected { border-color: var(--response); }
.tag { font-size: .75rem; font-weight: 650; text-transform: uppercase; letter-spacing: .03em; }
.chosen > .tag { color: var(--recall); } .rejected > .tag { color: var(--response); }
ul.claims { list-style: none; margin: .3rem 0 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .3rem; }
ul.claims li { font-size: .82rem; line-height: 1.35; border-radius: .35rem; padding: .12rem .45rem;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
li.yes { background: var(--yes); color: var(--yes-ink); }
li.mid { background: var(--mid); color: var(--mid-ink); }
li.no { background: var(--no); color: var(--no-ink); }
li.no span { text-decoration: line-through; text-decoration-thickness: 1px; }
li i { font-style: normal; opacity: .8; font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; }
.wrong { color: var(--response); font-weight: 600; }
pre { overflow-x: auto; font-size: .8rem; }
header nav { display: flex; flex-wrap: wrap; gap: .25rem .9rem; font-size: .9rem;
  border-bottom: 1px solid var(--line); padding-bottom: .75rem; }
nav a { color: var(--focus); text-decoration: none; padding: .15rem 0; }
nav a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; border-radius: .2rem; }
section { scroll-margin-top: 1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1rem; margin: .75rem 0 1rem; }
svg.small-chart { min-width: 0; }
figcaption { margin-top: .35rem; }
svg .ring { fill: none; stroke: var(--c); stroke-width: 2; }
svg .bar { fill: var(--k4); } svg .bar.yes { fill: var(--recall); } svg .bar.no { fill: var(--response); }
svg .line polyline { stroke-width: 2; }
.line-0 { --c: var(--k0); } .line-1 { --c: var(--k1); } .line-2 { --c: var(--k2); }
.line-3 { --c: var(--k3); } .line-4 { --c: var(--k4); } .line-5 { --c: var(--k5); }
ul.keys { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; margin: 0; }
ul.keys li::before { content: ""; display: inline-block; width: 1.1rem; height: .2rem;
  border-radius: .1rem; margin-right: .4rem; vertical-align: middle; background: var(--c); }
.key-0 { --c: var(--k0); } .key-1 { --c: var(--k1); } .key-2 { --c: var(--k2); }
.key-3 { --c: var(--k3); } .key-4 { --c: var(--k4); } .key-5 { --c: var(--k5); }
.filters { display: flex; flex-wrap: wrap; gap: .6rem 1.1rem; align-items: center; margin: .75rem 0; }
.filters[hidden] { display: none; }
.filters label { font-size: .9rem; color: var(--soft); }
.filters output { font-size: .9rem; color: var(--soft); margin-left: auto; }
select, input, button { font: inherit; font-size: .9rem; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: .35rem; padding: .25rem .5rem; }
button { padding: .5rem 1.2rem; cursor: pointer; display: block; margin: 0 auto; }
button[hidden], .example[hidden] { display: none; }
input[type="search"] { width: 9rem; }
.answer.after { border-color: var(--recall); } .answer.before { border-color: var(--response); }
code { font-size: .8rem; }
@media (max-width: 40rem) { .example { grid-template-columns: 1fr; }
  .example img { max-width: 15rem; } main { padding-top: 1rem; } }
"""
