"""The frame and the style sheet of report.html."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

STYLE = """
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #1f2430; --soft: #5b6472; --rule: #e3e6eb; --accent: #0072b2;
  --code: #f0f2f5; --shadow: 0 1px 2px rgb(20 30 50 / 6%), 0 4px 16px rgb(20 30 50 / 4%);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171d; --card: #1d2129; --ink: #e8eaee; --soft: #9aa3b2; --rule: #2f3541; --accent: #56b4e9;
    --code: #262b35; --shadow: none;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 48px 0 16px; letter-spacing: -0.01em; }
p { margin: 0; }
.kicker { color: var(--accent); font-weight: 600; font-size: 0.85rem; letter-spacing: 0.04em; margin-bottom: 4px; }
.soft { color: var(--soft); }
.note { color: var(--soft); font-size: 0.88rem; margin: 10px 2px 0; }
.progress { display: flex; align-items: center; gap: 12px; margin: 18px 0 24px; color: var(--soft); font-size: 0.9rem; }
.bar { flex: 1; height: 6px; border-radius: 3px; background: var(--rule); overflow: hidden; }
.bar span { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
.card, figure, .cards > div, details {
  background: var(--card); border-radius: 12px; box-shadow: var(--shadow); border: 1px solid var(--rule);
}
.cards { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 14px; margin: 0; }
.cards.columns-3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.cards > div { padding: 16px 18px; }
.cards dt { color: var(--soft); font-size: 0.85rem; }
.cards dd { margin: 0; }
.cards .value { font-size: 1.75rem; font-weight: 650; line-height: 1.3; letter-spacing: -0.02em; }
.cards .detail { color: var(--soft); font-size: 0.82rem; line-height: 1.4; }
figure { margin: 0; padding: 10px; overflow: hidden; }
figure img { display: block; width: 100%; height: auto; }
@media (prefers-color-scheme: dark) {
  /* Plots are drawn on white: black and white change places, and turning the hues back keeps each line's color. */
  figure img { filter: invert(0.885) hue-rotate(180deg); }
}
.wide { margin: 14px 0; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
.figures { grid-template-columns: repeat(6, minmax(0, 1fr)); }
.figures figure { grid-column: span 3; }
.figures.odd figure:nth-last-child(-n+3) { grid-column: span 2; }
.sample { padding: 18px 20px; margin-bottom: 14px; }
.prompt {
  font-weight: 600; margin-bottom: 12px; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 10rem;
  overflow-y: auto;
}
.sample .grid { gap: 20px; }
.sample h3 { margin: 0 0 4px; font-size: 0.85rem; font-weight: 600; color: var(--soft); }
.sample h3.last { color: var(--accent); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.95rem; max-height: 20rem; overflow-y: auto; }
.scroll { overflow-x: auto; padding: 6px 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 18px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; font-size: 0.82rem; vertical-align: bottom; }
tr:last-child td { border-bottom: 0; }
.facts th, .facts td { text-align: left; vertical-align: top; }
.facts th { width: 14rem; font-weight: 500; font-size: 0.88rem; padding-right: 0; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.facts tr:last-child th { border-bottom: 0; }
details { margin-bottom: 10px; overflow: hidden; }
summary { cursor: pointer; padding: 12px 18px; font-weight: 600; }
summary .soft { font-weight: 400; font-size: 0.88rem; margin-left: 6px; }
details[open] summary { border-bottom: 1px solid var(--rule); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.86rem; }
pre {
  background: var(--code); border-radius: 8px; padding: 12px 14px; margin: 6px 0 16px; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
.times { padding: 18px 20px 8px; }
.times .parts { display: flex; height: 14px; border-radius: 7px; overflow: hidden; margin-bottom: 10px; }
.times .name { text-align: left; }
.times i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 9px; }
.commands { padding: 18px 20px 4px; }
footer { margin-top: 40px; color: var(--soft); font-size: 0.85rem; }
@media (max-width: 760px) {
  main { padding: 24px 14px 48px; }
  h1 { font-size: 1.6rem; }
  h2 { margin: 36px 0 12px; }
  .cards, .cards.columns-3 { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .cards > div:last-child:nth-child(odd) { grid-column: span 2; }
  .cards > div { padding: 12px 14px; }
  .cards .value { font-size: 1.4rem; }
  .grid, .figures { grid-template-columns: minmax(0, 1fr); }
  .figures figure, .figures.odd figure:nth-last-child(-n+3) { grid-column: auto; }
  th, td { padding: 7px 12px; }
  .facts th { width: 38%; }
}
@media print { body { background: #ffffff; } figure, .card, .cards > div { break-inside: avoid; } }
""".strip()
