"""The style sheet of the report: light, dark and print; from a phone to a wide screen."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f4;--card:#fff;--ink:#1c1d1f;--soft:#5b5f66;--line:#dcdcd8;
--grid:#e8e8e4;
--understanding:#2c5cc5;--pixel:#0b7a69;--depth:#a55a06;--segmentation:#8440b0;--plain:#3f4650;
--gain:#14713f;--lost:#b3331a;--gainback:#e2f2e8;--lostback:#fbe8e3;--openback:#ececea}
@media (prefers-color-scheme:dark){:root{--page:#141517;--card:#1c1e21;--ink:#e9e9e6;--soft:#a3a8b0;
--line:#34373c;
--grid:#2a2d31;--understanding:#8fb0ff;--pixel:#52cbb4;--depth:#e6a95a;--segmentation:#d09cf2;--plain:#b9c0cb;
--gain:#6fd59b;--lost:#ff927b;--gainback:#173325;--lostback:#3d1f19;--openback:#2a2c30}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans",Ubuntu,Cantarell,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
main,header,footer,nav{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
header .eyebrow{margin:0;color:var(--soft);font-size:14px}
h1{margin:2px 0 12px;font-size:clamp(24px,4vw,36px);line-height:1.15;letter-spacing:-.015em}
h2{margin:0 0 6px;font-size:22px;line-height:1.25;letter-spacing:-.01em}
h3{display:flex;align-items:baseline;gap:8px;margin:0 0 8px;font-size:14.5px;font-weight:600}
h3 b{margin-left:auto;font-weight:600;white-space:nowrap}
section{margin:44px 0 0;scroll-margin-top:12px}
p{margin:0 0 12px}
small{font-size:12.5px;color:var(--soft)}
.note{color:var(--soft);font-size:14px;max-width:92ch}
.empty{color:var(--soft);font-style:italic}
.outcome{margin:0 0 20px;padding:14px 18px;max-width:none;border-left:5px solid var(--soft);border-radius:4px;
background:var(--openback);font-size:clamp(17px,2.1vw,21px);line-height:1.4}
.outcome.better{border-color:var(--gain);background:var(--gainback)}
.outcome.worse{border-color:var(--lost);background:var(--lostback)}
.outcome.better>span{color:var(--gain)}.outcome.worse>span{color:var(--lost)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:1px;margin:0;
background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden}
.facts div{padding:12px 14px;box-shadow:0 0 0 1px var(--line)}
.facts dt{color:var(--soft);font-size:13px}
.facts dd{margin:0;font-size:19px;font-weight:600;line-height:1.35;white-space:nowrap}
.facts small{display:block;font-weight:400}
.notices{margin:16px 0 0;padding:10px 16px 10px 34px;border:1px solid var(--line);border-radius:8px;
font-size:14px}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;margin:18px 0 0;padding:0;list-style:none;font-size:14px}
a{color:var(--understanding)}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.charts.three{grid-template-columns:repeat(3,minmax(0,1fr))}
.charts+.charts,.charts+div,details,.scroll+.note{margin-top:16px}
.scroll+.note{margin-top:8px}
.card{margin:0;padding:14px 16px 12px;background:var(--card);border:1px solid var(--line);border-radius:8px;
min-width:0}
figcaption{color:var(--soft);font-size:13px}
.card>figcaption:first-child{margin-bottom:8px;color:var(--ink);font-size:14.5px;font-weight:600}
svg{display:block;width:100%;height:auto;color:var(--ink)}
svg text{font-size:13px;fill:var(--ink)}
svg .tick{fill:var(--soft)}svg .end{text-anchor:end}svg .middle{text-anchor:middle}
svg .value{font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
svg .grid{stroke:var(--grid)}svg .zero{stroke:var(--soft);stroke-width:1}
svg .mark{stroke:var(--soft);stroke-dasharray:2 3}
svg .broken{fill:var(--lost);text-anchor:middle;font-weight:700}
svg .raw{fill:none;stroke-width:1;opacity:.32;stroke-linejoin:round}
svg .smooth{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
svg .whisker{stroke-width:2.2}
svg.glyph{width:180px;min-width:120px;max-width:100%}
.understanding{--c:var(--understanding)}.pixel{--c:var(--pixel)}.depth{--c:var(--depth)}
.segmentation{--c:var(--segmentation)}.plain{--c:var(--plain)}.open{--c:var(--soft)}
.gain{--c:var(--gain)}.lost{--c:var(--lost)}
svg .raw,svg .smooth,svg .whisker{stroke:var(--c)}svg .dot{fill:var(--c)}
svg circle.dot{stroke:var(--card);stroke-width:1.5}svg circle.open{fill:var(--card);stroke:var(--c);
stroke-width:2}
.key{flex:none;width:10px;height:10px;border-radius:3px;background:var(--c);align-self:center}
.moved{display:grid;grid-template-columns:1fr 1fr;gap:10px 20px;margin-bottom:8px}
.moved div{display:grid;grid-template-columns:auto 1fr;column-gap:12px;align-items:baseline}
.moved b{font-size:20px}.moved small{grid-column:2}
.signs,.sign{color:var(--c,var(--soft));font-weight:700;white-space:nowrap}
.scenes{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:16px}
.scene{display:grid;grid-template-columns:auto repeat(3,minmax(0,1fr));gap:6px}
.scene b{font-size:12px;text-align:center;white-space:nowrap}
.scene i{font-style:normal;font-size:13px;color:var(--soft);writing-mode:vertical-rl;transform:rotate(180deg);
text-align:center}
.scene small{display:block;font-size:11.5px;line-height:1.3;text-align:center}
.scene img,.missing{display:block;width:100%;aspect-ratio:1;object-fit:contain;border-radius:3px;
background:var(--openback)}
.crisp{image-rendering:pixelated}
.missing{display:grid;place-items:center;color:var(--soft);font-size:12px;border:1px dashed var(--line)}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}
table{width:100%;border-collapse:collapse;font-size:14.5px}
th{padding:9px 14px;border-bottom:1px solid var(--line);color:var(--soft);font-size:13px;font-weight:600;
text-align:left;overflow-wrap:normal}
th:first-child,td:first-child,#events td:nth-child(n+3){min-width:120px}
td{padding:8px 14px;border-bottom:1px solid var(--grid);vertical-align:top;unicode-bidi:isolate}
tr:last-child td{border-bottom:0}
td small{display:block}.numbers td:nth-child(n+2) small{display:inline}
.numbers td:nth-child(n+2){white-space:nowrap}
.answers{table-layout:fixed}
.answers th:first-child{width:44%}
.said{white-space:pre-wrap;unicode-bidi:isolate}
.reply{display:flex;gap:8px}
.tag{display:inline-block;margin-top:3px;padding:0 7px;border-radius:9px;font-size:12px;color:var(--c)}
.tag.gain{background:var(--gainback)}.tag.lost{background:var(--lostback)}
.bar{display:block;height:12px;margin-top:5px;min-width:2px;border-radius:2px;background:var(--plain)}
#skipped td:nth-child(3){width:24%;min-width:90px}
.event{font-weight:600}.event.failed{color:var(--lost)}
details>summary{padding:9px 14px;cursor:pointer;border:1px solid var(--line);border-radius:8px;
background:var(--card);
font-size:14.5px}
details[open]>summary{margin-bottom:12px}
code,pre{font:13.5px/1.5 ui-monospace,"SF Mono","Cascadia Mono","DejaVu Sans Mono",Menlo,Consolas,monospace}
pre{margin:0 0 12px;padding:14px 16px;background:var(--card);border:1px solid var(--line);border-radius:8px;
white-space:pre-wrap}
footer{margin-top:48px;padding-bottom:40px;color:var(--soft);font-size:13px}
@media (max-width:1020px){
svg text{font-size:16px}.charts.three svg text{font-size:13px}
.charts.three{grid-template-columns:repeat(2,minmax(0,1fr))}
.facts{grid-template-columns:repeat(4,1fr)}
.numbers td:nth-child(n+2){white-space:normal;overflow-wrap:normal}
.numbers td:nth-child(n+2) small{display:block}
td,th{padding-left:10px;padding-right:10px}svg.glyph{width:120px;min-width:96px}
}
@media (max-width:700px){
.charts,.charts.three{grid-template-columns:minmax(0,1fr)}
main,header,footer,nav{padding:0 14px}header{padding-top:22px}
section{margin-top:34px}
.facts{grid-template-columns:1fr 1fr}
svg text{font-size:16px}.charts.three svg text{font-size:13px}
.card{padding:12px 10px 10px}
table,tbody,tr,td{display:block;width:100%!important}thead{display:none}
tr{padding:8px 12px;border-bottom:1px solid var(--line)}tr:last-child{border-bottom:0}
th:first-child,td:first-child,#events td:nth-child(n+3){min-width:0}
td{display:grid;grid-template-columns:92px minmax(0,1fr);gap:0 10px;padding:3px 0;border:0}
svg.glyph{width:180px}
td::before{content:attr(data-label);color:var(--soft);font-size:13px}
td>*{grid-column:2}.numbers td:nth-child(n+2){white-space:normal}
td:first-child{grid-template-columns:1fr}td:first-child::before{display:none}td:first-child>*{grid-column:1}
}
@media print{
:root{color-scheme:light;--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--grid:#ddd;
--understanding:#2c5cc5;
--pixel:#0b7a69;--depth:#a55a06;--segmentation:#8440b0;--plain:#3f4650;--gain:#14713f;--lost:#b3331a;
--gainback:#fff;--lostback:#fff;--openback:#fff}
body{font-size:10.5pt}
svg text{font-size:16px}nav,details:not([open]){display:none}.facts{grid-template-columns:repeat(4,1fr)}
.numbers td:nth-child(n+2){white-space:normal;overflow-wrap:normal}
.numbers td:nth-child(n+2) small{display:block}
table{font-size:9.5pt}td,th{padding:5px 8px}svg.glyph{width:110px;min-width:90px}
.scenes{grid-template-columns:1fr 1fr}main,header,footer{max-width:none;padding:0}
.card,tr,.outcome,.facts{break-inside:avoid}h2,h3{break-after:avoid}section{margin-top:24px}
.outcome{border:1px solid #888;border-left-width:5px}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
}
"""
