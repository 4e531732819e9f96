"""Style sheet of the page."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#59636e;
--rule:#d4d9df;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b0508f;--c4:#b37400;--c5:#2a8bc9;
--c6:#444}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1d2127;--ink:#e8eaed;
--soft:#a3acb6;--rule:#3a414a;--c0:#56b4e9;--c1:#ff8a3d;--c2:#2fd0a0;--c3:#e29ac5;--c4:#f0b429;
--c5:#8ad0ff;--c6:#ccc}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:0 0 .25rem;overflow-wrap:anywhere}p{max-width:46rem;margin:.4rem 0}
.soft,small{color:var(--soft)}
table{border-collapse:collapse;width:100%}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--rule);text-align:right;
vertical-align:top}
th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere}
td small{display:block;white-space:nowrap}
.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr))}
.card{background:var(--card);border:1px solid var(--rule);border-radius:.5rem;padding:.75rem;
break-inside:avoid}
.chart{display:block;width:100%;height:auto;max-width:30rem;overflow:visible}
.chart text{fill:var(--soft);font:11px system-ui,sans-serif}
.chart .axis{stroke:var(--soft);fill:none}.chart .faint{stroke:var(--rule);fill:none}
.chart .ink{stroke:var(--ink);fill:none;stroke-width:1.3}.band{fill:var(--c0);opacity:.18}
.line{fill:none;stroke:var(--c);stroke-width:1.8}.area{fill:var(--c);fill-opacity:.3;
stroke:var(--c);stroke-width:1.2}.point{fill:var(--c);opacity:.75}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}
.s5{--c:var(--c5)}.s6{--c:var(--c6)}
.legend{list-style:none;padding:0;margin:.4rem 0 0;font-size:.85rem;display:flex;flex-wrap:wrap;
gap:.1rem 1rem}.legend li{overflow-wrap:anywhere}
.key{width:26px;height:12px;margin-right:.35rem;vertical-align:middle}
.gallery{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fill,minmax(var(--w),1fr))}
figure{margin:0;font-size:.8rem;line-height:1.3;break-inside:avoid;min-width:0}
figcaption{overflow-wrap:anywhere;margin-top:.2rem}
.pair{display:flex;gap:3px}.pair>*{flex:1 1 0;min-width:0;position:relative}
.pair img{display:block;width:100%;height:auto}
.small img:first-child{image-rendering:pixelated}
.pair .attention{position:absolute;inset:0;height:100%;image-rendering:auto}
dl{columns:18rem;column-gap:2rem;font-size:.85rem;margin:0}
dl div{break-inside:avoid;display:flex;gap:.5rem;justify-content:space-between;
border-bottom:1px solid var(--rule);padding:.1rem 0}
dt{color:var(--soft)}dd{margin:0;text-align:right;overflow-wrap:anywhere}
@media screen and (max-width:40rem){thead{display:none}tr,td{display:block}
tr{border-bottom:1px solid var(--rule);padding:.5rem 0}td{border:0;padding:.1rem 0;
display:flex;justify-content:space-between;gap:1rem}td:first-child{font-weight:600}
td[data-label]::before{content:attr(data-label);color:var(--soft)}td:empty{display:none}
td small{display:inline;margin-left:.5rem}}
@media print{body{font-size:10pt;padding:0;max-width:none;print-color-adjust:exact;
-webkit-print-color-adjust:exact}h2{break-after:avoid}.card{border-color:#bbb}}
"""
