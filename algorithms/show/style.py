"""The style sheet of every page that Burnish writes: light and dark, for a phone and a desktop, without a script."""

STYLE = """
 :root { color-scheme: light dark; --ink: #1c2430; --quiet: #566373; --line: #dbe1e8; --ground: #ffffff;
  --raised: #f4f6f9; --good: #17663a; --bad: #a32d2d; --busy: #1f5fae;
  --c0: #1f5fae; --c1: #b8490b; --c2: #17763f; --c3: #7a3fc4; --c4: #8a6a00; --c5: #b0276b }
 @media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --quiet: #a3afbe; --line: #333c49;
  --ground: #12161c; --raised: #1b212a; --good: #63d297; --bad: #ff8f8f; --busy: #74b3ff;
  --c0: #74b3ff; --c1: #ff9d5c; --c2: #5fd08c; --c3: #c39bff; --c4: #e5c04d; --c5: #ff86bd } }
 * { box-sizing: border-box }
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  color: var(--ink); background: var(--ground); overflow-wrap: anywhere }
 h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 .2rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem }
 h3 { font-size: 1rem; margin: 0 0 .2rem } a { color: var(--c0) }
 .quiet { color: var(--quiet) } .small { font-size: .875rem }
 .badge { display: inline-block; padding: .05rem .6rem; border-radius: 1rem; border: 1px solid; font-weight: 600 }
 .running { color: var(--busy) } .finished { color: var(--good) } .stopped { color: var(--bad) }
 table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
 th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
 th:first-child, td:first-child, .words td, .words th { text-align: left } thead th { border-color: var(--ink) }
 .words td:first-child { width: 40%; color: var(--quiet) } .changed td { font-weight: 600 }
 .narrow { max-width: 44rem } .scroll { overflow-x: auto } .scroll td, .scroll th { overflow-wrap: normal }
 .scroll .metrics td { white-space: nowrap }
 .scroll .metrics td:first-child { white-space: normal; overflow-wrap: anywhere }
 .meter { display: inline-block; height: .6rem; background: var(--c0); vertical-align: middle; margin-right: .5rem }
 .number { display: inline-block; min-width: 3rem }
 @media (max-width: 30rem) { .scroll table { font-size: .85rem } .scroll th, .scroll td { padding: .3rem .2rem }
  .scroll td:first-child { min-width: 5rem } .meter { display: none } .number { min-width: 0 } }
 pre { background: var(--raised); padding: .6rem .8rem; margin: .3rem 0 .8rem; border-radius: .3rem; overflow-x: auto;
  font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap; unicode-bidi: plaintext }
 details > summary { cursor: pointer; color: var(--quiet) } details pre { margin-top: .5rem }
 .curves { display: grid; gap: 1.4rem 1.6rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
 figure { margin: 0; min-width: 0 } .wide { max-width: 34rem }
 .sample { border-left: 3px solid var(--line); padding-left: .8rem; margin: 1rem 0 }
 .legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .875rem; color: var(--quiet); margin: .2rem 0 0 }
 .key { display: inline-block; width: 1.1rem; border-top: 3px solid; margin-right: .4rem; vertical-align: middle }
 .key.dotted { border-top-style: dotted } .key.faint { opacity: .4; border-top-width: 1px }
 .key.marks { width: .6rem; height: .6rem; border: 0; border-radius: 50%; background: currentColor }
 .key.marks.dotted { background: none; border: 2px solid }
 svg.curve { display: block; width: 100%; height: auto } svg.curve path { fill: none; stroke-linecap: round }
 svg.curve text { font: 11px system-ui, sans-serif; fill: var(--quiet); stroke: none }
 svg.curve .grid { stroke: var(--line) } svg.curve .line { stroke-width: 1.8; stroke-linejoin: round }
 svg.curve .faint { stroke-width: 1; opacity: .5 } svg.curve .dotted { stroke-dasharray: 1 4 }
 svg.curve .marks { stroke-width: 8 } svg.curve .hole { stroke: var(--ground); stroke-width: 4 }
 svg.curve .bar { stroke-width: 1.3 }
 .c0 { stroke: var(--c0); color: var(--c0) } .c1 { stroke: var(--c1); color: var(--c1) }
 .c2 { stroke: var(--c2); color: var(--c2) } .c3 { stroke: var(--c3); color: var(--c3) }
 .c4 { stroke: var(--c4); color: var(--c4) } .c5 { stroke: var(--c5); color: var(--c5) }
"""

LEGEND = """{% macro legend(series) %}{% if series | length > 1 %}<p class="legend">{% for one in series %}<span>
<span class="key c{{ one.colour % 6 }}{{ ' marks' if not one.line }}{{ ' faint' if one.faint }}{{
 ' dotted' if one.dotted }}"></span>{{ one.label }}</span>{% endfor %}</p>{% endif %}{% endmacro %}"""
