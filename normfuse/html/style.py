"""The style of the pages: light and dark, wide and narrow, on paper."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#1c2126;--muted:#59626b;--line:#d8dcd9;--soft:#eef0ec;
--rms:#0b6e69;--rms-soft:#d8efec;--ln:#4b3fa6;--ln-soft:#e5e2f8;--mix:#8a4b08;--mix-soft:#fbead2;--ff:#2a5580;
--ff-soft:#dfeaf5;--good:#1d6b3a;--good-soft:#ddf1e3;--warn:#8a5a00;--warn-soft:#fbefcf;--bad:#a32020;--bad-soft:#fbe2e0;
--before:#8b939b;--after:#0b6e69;--focus:#1a5fd0;--shade:#1c212638}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1c2024;--ink:#e7eaec;--muted:#a3adb5;--line:#363d43;
--soft:#252a2f;--rms:#6fd3c9;--rms-soft:#12403d;--ln:#b9b1ff;--ln-soft:#322c63;--mix:#f0b465;--mix-soft:#4a3210;
--ff:#93c0ec;--ff-soft:#1d3a57;--good:#7fd59c;--good-soft:#173a24;--warn:#f0c766;--warn-soft:#40330f;--bad:#ff9a92;
--bad-soft:#4a1f1d;--before:#8b959d;--after:#6fd3c9;--focus:#8ab4ff;--shade:#000a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
main{max-width:1120px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.6rem;line-height:1.25;margin:4px 0 12px;font-weight:650}
h2{font-size:1.2rem;margin:0 0 12px;font-weight:650}
h3{font-size:1rem;margin:18px 0 8px;font-weight:650}
p{margin:0 0 10px;max-width:76ch}
section,.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin:0 0 18px}
.kicker,.muted{color:var(--muted)}.kicker{font-size:.85rem;margin:0}
.muted{font-size:.9rem}.tiles+.muted{margin-top:12px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:0 0 18px;font-size:.95rem}
a{color:var(--ff)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:3px solid var(--focus);outline-offset:2px;
border-radius:4px}
code,.name,.formula,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em}
.name{unicode-bidi:isolate;word-break:break-word}
.formula{white-space:nowrap;font-size:1.02em}
sup{font-size:.75em;line-height:0}
pre{margin:0 0 10px;padding:12px;background:var(--soft);border-radius:6px;white-space:pre-wrap}
.scroll{overflow-x:auto;margin:0 0 10px;max-width:100%;
background:linear-gradient(90deg,var(--card) 40%,transparent) 0 0/40px 100% no-repeat local,
linear-gradient(270deg,var(--card) 40%,transparent) 100% 0/40px 100% no-repeat local,
linear-gradient(90deg,var(--shade),transparent) 0 0/12px 100% no-repeat,
linear-gradient(270deg,var(--shade),transparent) 100% 0/12px 100% no-repeat}
table{border-collapse:collapse;width:100%;font-size:.9rem;overflow-wrap:normal}
.short td{white-space:nowrap}.short td:nth-child(2){white-space:normal;min-width:15ch}
.card .short td,.card .short th{padding-right:10px}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--muted);font-weight:600;white-space:nowrap}
td .name{display:inline-block;min-width:16ch;overflow-wrap:anywhere}td>.tag,.nb{white-space:nowrap}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:14px 0 0}
.tile{background:var(--soft);border-radius:8px;padding:10px 12px}
.tile b{display:block;font-size:1.2rem;font-weight:650;font-variant-numeric:tabular-nums;line-height:1.3}
.tile>span{color:var(--muted);font-size:.85rem}
.verdict{font-size:1.08rem;padding:12px 14px;border-radius:8px;margin:0 0 10px;max-width:none}
.good{background:var(--good-soft);color:var(--good)}.warn{background:var(--warn-soft);color:var(--warn)}
.bad{background:var(--bad-soft);color:var(--bad)}
.tag{display:inline-block;padding:0 8px;border-radius:9px;font-size:.85rem;white-space:nowrap}
details{border-top:1px solid var(--line);padding:8px 0}
details details{margin-left:14px}
summary{cursor:pointer;padding:4px 0}
summary .muted{margin-left:6px}
dl{margin:0;display:grid;gap:4px}
dl div{display:grid;grid-template-columns:minmax(9ch,16ch) 1fr;gap:12px}
dt{color:var(--muted)}dd{margin:0;min-width:0}
.sides{display:grid;grid-template-columns:1fr auto 1fr;gap:12px;align-items:center;margin:8px 0 12px}
.sides>div{background:var(--soft);border-radius:8px;padding:10px 12px;min-width:0}
.sides p{margin:0 0 4px}
.ops{display:flex;flex-wrap:wrap;gap:4px}
.op{background:var(--card);border:1px solid var(--line);border-radius:5px;padding:0 7px;font-size:.85rem;
font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.op.new{border-color:var(--after);color:var(--after);font-weight:600}
.arrow{font-size:1.4rem;color:var(--muted)}
.recipe{display:flex;flex-wrap:wrap;gap:0 36px;align-items:flex-start}.uses{flex:1 1 400px;min-width:0}
.gallery .uses{flex-basis:100%}
.gallery{columns:480px 2;column-gap:18px}
.gallery .card{break-inside:avoid}
.rms-tag{background:var(--rms-soft);color:var(--rms)}.ln-tag{background:var(--ln-soft);color:var(--ln)}
.blocks{display:flex;flex-wrap:wrap;gap:8px 28px;margin:10px 0}
figure{margin:0 0 12px;min-width:0}
figcaption{font-size:.95rem;margin:0 0 2px}
svg{max-width:100%;display:block}svg[viewBox]{height:auto}
svg text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
svg .small{font-size:12px;fill:var(--muted)}
svg .mid{text-anchor:middle}svg .end{text-anchor:end}
svg .wire{stroke:var(--muted);stroke-width:1.5;fill:none}
svg .stream{stroke:var(--ink);stroke-width:2.5;fill:none}
svg .grid{stroke:var(--line);stroke-width:1}
svg .frame{fill:none;stroke:var(--line);stroke-dasharray:5 4}
svg .plus{fill:var(--card);stroke:var(--ink);stroke-width:2}
svg .head{fill:var(--muted)}
svg .rms{fill:var(--rms-soft);stroke:var(--rms)}svg .ln{fill:var(--ln-soft);stroke:var(--ln)}
svg .attention{fill:var(--mix-soft);stroke:var(--mix)}svg .ff{fill:var(--ff-soft);stroke:var(--ff)}
svg .before{fill:var(--card);stroke:var(--before);stroke-width:1.6}svg .after{fill:var(--after);stroke:var(--after)}
svg .grid-bar{fill:var(--line)}svg .limit{stroke:var(--muted);stroke-width:1.5;stroke-dasharray:4 3;fill:none}
svg .bar-before{fill:var(--before)}svg .bar-after{fill:var(--after)}
.key{display:inline-block;width:.8em;height:.8em;border-radius:50%;border:2px solid;vertical-align:-1px;
margin:0 5px 0 0}
.key.before{border-color:var(--before)}.key.after{border-color:var(--after);background:var(--after)}
.bars{width:180px}.plot{max-width:760px;overflow:visible;margin:0 0 8px}
@media (max-width:560px){main{padding:14px 10px 40px}section,.card{padding:14px 12px}h1{font-size:1.3rem}
.sides{grid-template-columns:1fr}.arrow{transform:rotate(90deg);justify-self:center;line-height:1}
dl div{display:flex;flex-wrap:wrap;gap:0 12px}dt{min-width:13ch}details details{margin-left:0}
.rows thead{display:block;position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
.rows tr,.rows td{display:block}.rows tr{border-bottom:1px solid var(--line);padding:6px 0}
.rows td{display:grid;grid-template-columns:13ch 1fr;gap:8px;border:0;padding:1px 0;text-align:left;
white-space:normal}.rows td:empty{display:none}
.rows td::before{content:attr(data-label);color:var(--muted)}.rows .name{min-width:0}
.narrow table{font-size:.82rem}.narrow td,.narrow th{padding-right:8px}
.short table{font-size:.78rem}.card .short td,.card .short th,.short td,.short th{padding-right:6px}
.short td:nth-child(2){min-width:9ch}.short td:last-child,.short th:last-child{padding-right:0}
.short td:last-child{white-space:normal}.short .tag{padding:0 6px;font-size:.78rem}
.narrow td{overflow-wrap:anywhere}.narrow .bars{width:64px}
summary .name{word-break:break-all}.formula{white-space:normal}}
@media print{:root{color-scheme:light;--page:#fff;--card:#fff}body{font-size:11pt}nav{display:none}
section,.card{border:0;padding:0;break-inside:auto}figure,tr{break-inside:avoid}.scroll{overflow:visible}
details::details-content{content-visibility:visible;block-size:auto}}
""".strip()
