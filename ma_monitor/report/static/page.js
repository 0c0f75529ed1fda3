"use strict";
(() => {
  const HUES = 7; // colours of lines: --k0 … --k6 in the style sheet
  const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
  const DECADES = 30; // values that span more than this factor get a logarithmic axis
  const CONTEXT = 300; // points of a line that only gives context
  const CHOSEN = 3; // layers shown at first
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const root = document.documentElement;
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const hue = (k) => css("--k" + k % HUES);

  // ---- what is kept while the page loads itself again
  const kept = {
    read(key, otherwise) {
      try { return JSON.parse(sessionStorage.getItem(location.pathname + key)) ?? otherwise; } catch { return otherwise; }
    },
    write(key, value) {
      try { sessionStorage.setItem(location.pathname + key, JSON.stringify(value)); } catch { /* private mode: not kept */ }
    },
  };

  // ---- numbers
  const number = (v) => v == null ? "-" : Math.abs(v) >= 1e4 && Math.abs(v) < 1e12
    ? Math.round(v).toLocaleString("en-US") : String(+v.toPrecision(4));
  const whole = (v) => Math.round(v).toLocaleString("en-US");
  const short = (v) => {
    for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (v >= unit) return +(v / unit).toPrecision(3) + letter;
    return String(+v.toPrecision(3));
  };
  function extent(values, above = -Infinity) { // lowest and highest of nested lists, of what is known and above a bound
    let low = Infinity, high = -Infinity;
    for (const v of values) {
      const [a, b] = Array.isArray(v) ? extent(v, above) : v != null && v > above ? [v, v] : [Infinity, -Infinity];
      if (a < low) low = a;
      if (b > high) high = b;
    }
    return [low, high];
  }

  // ---- scales: a place on an even axis for a value, and which values are written on it
  function even(low, high) {
    if (!(high > low)) [low, high] = [low - 1, high + 1];
    const rough = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((m) => m * unit >= rough);
    const ticks = [];
    for (let v = Math.ceil(low / step) * step; v <= high * (1 + 1e-9); v += step) ticks.push(+v.toPrecision(12));
    return { at: (v) => v, back: (p) => p, low, high, ticks };
  }
  function decades(low, high) {
    const few = high / low < 300, ticks = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
      for (const m of few ? [1, 2, 5] : [1]) if (m * 10 ** p >= low * 0.999 && m * 10 ** p <= high * 1.001) ticks.push(m * 10 ** p);
    return { at: (v) => v > 0 ? Math.log10(v) : null, back: (p) => 10 ** p, low: Math.log10(low), high: Math.log10(high), ticks };
  }
  function ratios(values, floor = null) { // logarithmic where values span decades, else from 0
    let [low, high] = extent(values, 0);
    if (!(high > 0)) return even(0, 1);
    if (floor) [low, high] = [Math.min(low, floor), Math.max(high, floor)];
    return high > DECADES * low || floor ? decades(low * 0.85, high * 1.2) : even(0, high * 1.08);
  }
  function steps(kind, low, high) { // logarithmic above the first step, even below it
    if (kind !== "log" || high <= 1) return even(low, high);
    const first = Math.max(1, low);
    const at = (s) => s <= first ? (s / first) / 2 : 0.5 + Math.log10(s / first);
    const back = (p) => p <= 0.5 ? 2 * p * first : first * 10 ** (p - 0.5);
    const ticks = low < first ? [low] : [];
    for (let p = Math.ceil(Math.log10(first)); 10 ** p <= high; p++) ticks.push(10 ** p);
    if (ticks.length < 3) ticks.push(high);
    return { at, back, low: at(low), high: at(high), ticks };
  }

  // ---- pieces of charts
  const rule = () => ({ onZero: false, lineStyle: { color: css("--line") } });
  function axis(scale, name, words, more = {}) {
    const places = scale.ticks.map(scale.at);
    return {
      type: "value", min: scale.low, max: scale.high, name, nameLocation: "middle", nameTextStyle: { color: css("--soft") },
      axisLabel: { customValues: places, formatter: (p) => words(scale.back(p)), color: css("--soft"), hideOverlap: true },
      axisTick: { show: true, customValues: places, lineStyle: { color: css("--line") } },
      axisLine: rule(), splitLine: { show: false }, ...more,
    };
  }
  function layersAxis(first, many, name = "layer") {
    return {
      type: "category", data: Array.from({ length: many }, (_, i) => String(first + i)), name, nameLocation: "middle",
      nameGap: 26, nameTextStyle: { color: css("--soft") }, axisLabel: { color: css("--soft"), hideOverlap: true },
      axisTick: { show: false }, axisLine: rule(),
    };
  }
  const across = () => ({ nameGap: 26 });
  const upward = () => ({ nameGap: 46, splitLine: { show: true, lineStyle: { color: css("--line"), opacity: 0.5 } } });
  const grid = (more = {}) => ({ left: 62, right: 18, top: 14, bottom: 44, outerBoundsMode: "none", ...more });
  const tooltip = (trigger, formatter) => ({
    trigger, formatter, confine: true, transitionDuration: 0, backgroundColor: css("--panel"), borderColor: css("--line"),
    textStyle: { color: css("--ink") }, className: "tip", axisPointer: { type: "line", lineStyle: { color: css("--soft") } },
  });
  const line = (data, color, more = {}) => ({
    type: "line", data, showSymbol: false, symbolSize: 5, sampling: "lttb", color,
    lineStyle: { width: 2, color }, emphasis: { disabled: true }, ...more,
  });
  function area(points, color, opacity) { // a polygon along the lower and back along the upper edge
    return {
      type: "custom", silent: true, clip: true, data: points.length ? [points[0]] : [], tooltip: { show: false }, z: 1,
      renderItem: (_, api) => ({ type: "polygon", shape: { points: points.map((p) => api.coord(p)) }, style: { fill: color, opacity } }),
    };
  }
  function edges(x, y, times, low, high) {
    const known = times.map((_, i) => i).filter((i) => low[i] != null && high[i] != null);
    const point = (values) => (i) => [x.at(times[i]), Math.max(y.at(values[i]) ?? y.low, y.low)];
    return [...known.map(point(low)), ...known.reverse().map(point(high))];
  }
  const points = (x, y, times, values) => times.map((t, i) => [x.at(t), values[i] == null ? null : y.at(values[i])]);
  const nearest = (times, t) => {
    let low = 0, high = times.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (times[mid] < t) low = mid; else high = mid; }
    return Math.abs(times[low] - t) <= Math.abs(times[high] - t) ? low : high;
  };

  // ---- one run
  function view(article, index, all) {
    const { drawn, rows, track, now, end, live } = all[index];
    if (!drawn) return { show() {}, redraw() {} };
    const id = index, many = rows.length;
    const byRatio = rows.map((r) => r.layer).sort((a, b) => (rows[b - 1].now ?? Infinity) - (rows[a - 1].now ?? Infinity) || a - b);
    const top = drawn.ratios[byRatio[0] - 1], highest = extent(top)[1];
    const half = drawn.steps[top.findIndex((v) => v >= highest / 2)];
    const late = half > 0.08 * drawn.steps.at(-1); // what happens early would be a wall on an even axis
    const ahead = live && now > 0.1 * (drawn.future.at(-1) ?? Infinity); // and what is to come a sliver on the other
    const state = { x: late || ahead ? "linear" : "log", origin: -1, ranks: false, fit: true, map: 0, ...kept.read("state " + id, {}) };
    let chosen = kept.read("layers " + id, byRatio.slice(0, CHOSEN)).filter((layer) => layer <= many);
    const charts = new Map();
    const colour = (layer) => hue(Math.max(chosen.indexOf(layer), 0));

    const options = {
      overview() {
        const ranges = live ? rows.map((r) => [r.low, r.high]) : drawn.ratios.map((own) => extent(own));
        const [low, high] = [0, 1].map((k) => ranges.map((r) => Number.isFinite(r[k]) ? r[k] : null));
        const y = ratios([low, high, rows.map((r) => r.now)], 100), color = css("--c0");
        const marks = [100, 1000].filter((v) => y.at(v) <= y.high);
        return {
          grid: grid({ right: 52 }), xAxis: layersAxis(1, many), yAxis: axis(y, "largest / median", short, upward()),
          tooltip: tooltip("axis", ([p]) => {
            const r = rows[p.dataIndex];
            const more = live ? `at step ${r.at == null ? "-" : whole(r.at)}: ${r.end_words}` : `from ${number(low[p.dataIndex])} to ${number(high[p.dataIndex])}`;
            return `<b>layer ${r.layer}</b><br>now ${number(r.now)}<br>${more}<br>${r.heading}${live ? ", " + r.sure : ""}`;
          }),
          series: [
            {
              type: "custom", clip: true, z: 2, data: rows.map((r, i) => [i, y.at(low[i] ?? NaN), y.at(high[i] ?? NaN), y.at(live ? r.middle ?? NaN : NaN)]),
              renderItem: (_, api) => {
                const [i, a, b, m] = [0, 1, 2, 3].map((k) => api.value(k));
                if (!isFinite(a) || !isFinite(b)) return null;
                const width = Math.max(3, Math.min(16, api.size([1, 0])[0] * 0.5));
                const [x, top] = api.coord([i, b]), bottom = api.coord([i, Math.max(a, y.low)])[1], middle = api.coord([i, m])[1];
                const children = [{ type: "rect", shape: { x: x - width / 2, y: top, width, height: Math.max(bottom - top, 2), r: 2 }, style: { fill: color, opacity: 0.5 } }];
                if (isFinite(m)) children.push({ type: "rect", shape: { x: x - width / 2 - 2, y: middle - 1, width: width + 4, height: 2 }, style: { fill: color } });
                return { type: "group", children };
              },
            },
            {
              type: "scatter", z: 3, symbolSize: many > 40 ? 5 : 8, color: css("--ink"), data: rows.map((r) => r.now == null ? null : y.at(r.now)), emphasis: { disabled: true },
              itemStyle: { borderColor: css("--paper"), borderWidth: 1 },
              markLine: {
                silent: true, symbol: "none", lineStyle: { color: css("--c1"), type: "dashed" }, data: marks.map((v) => ({ yAxis: y.at(v), name: `${v} ×` })),
                label: { formatter: "{b}", position: "end", color: css("--c1") },
              },
            },
          ],
        };
      },

      trajectories(chart) {
        const old = track[state.origin], times = old ? old.steps : drawn.future;
        const bands = (layer) => old ? [null, ...old.bands.map((b) => b[layer - 1]), null] : drawn.bands[layer - 1];
        const last = Math.max(drawn.steps.at(-1), times.at(-1) ?? 0);
        const x = steps(state.x, drawn.steps[0], last);
        const held = chosen.flatMap((layer) => [drawn.ratios[layer - 1], ...bands(layer), state.ranks ? drawn.ranks.map((r) => r[layer - 1]) : []]);
        const y = ratios(chosen.length ? held.map((v) => v ?? []) : drawn.ratios);
        const stride = Math.max(1, Math.ceil(drawn.steps.length / CONTEXT));
        const some = drawn.steps.map((_, i) => i).filter((i) => i % stride === 0 || i === drawn.steps.length - 1);
        const context = rows.filter((r) => !chosen.includes(r.layer)).flatMap((r) => {
          const own = drawn.ratios[r.layer - 1];
          return [...some.map((i) => [x.at(drawn.steps[i]), own[i] == null ? null : y.at(own[i])]), [x.low, null]];
        }); // one line with gaps: drawn many times faster than a line a layer
        const series = [line(context, css("--faint"), { silent: true, z: 0, sampling: undefined, lineStyle: { width: 1, color: css("--faint") } })];
        const few = drawn.few ? drawn.few.map((i) => drawn.steps[i]) : drawn.steps;
        for (const layer of chosen) {
          const color = colour(layer), [outer, low, middle, high, upper] = bands(layer);
          if (outer) series.push(area(edges(x, y, times, outer, upper), color, 0.13));
          series.push(area(edges(x, y, times, low, high), color, 0.25));
          series.push(line(points(x, y, times, middle), color, { z: 3, lineStyle: { width: 1.5, color, opacity: 0.8 } }));
          if (state.fit && drawn.curves[layer - 1])
            series.push(line(points(x, y, drawn.curve_steps, drawn.curves[layer - 1]), color, { z: 3, lineStyle: { width: 1.2, type: "dashed", color } }));
          if (state.ranks) drawn.ranks.forEach((rank, k) => series.push(line(points(x, y, few, rank[layer - 1]), color, { z: 2, lineStyle: { width: 1, opacity: 0.8 - 0.25 * k, color } })));
          series.push(line(points(x, y, drawn.steps, drawn.ratios[layer - 1]), color, { z: 4, showSymbol: drawn.steps.length <= 60 }));
        }
        const origin = old ? old.at : now;
        $("[data-forecast]", article).hidden = !times.length;
        series.push(line([], css("--soft"), {
          markLine: { silent: true, symbol: "none", lineStyle: { color: css("--soft"), type: "dotted" }, label: { formatter: old ? "forecast made" : "now", color: css("--soft"), position: "insideEndTop", rotate: 0 }, data: times.length ? [{ xAxis: x.at(origin) }] : [] },
        }));
        const told = (step) => {
          const measured = nearest(drawn.steps, step), ahead = times.length && step > (drawn.steps.at(-1) + (times[0] ?? step)) / 2;
          const at = ahead ? times[nearest(times, step)] : drawn.steps[measured];
          const lines = chosen.map((layer) => {
            const [, low, middle, high] = bands(layer), k = times.length && at > origin ? nearest(times, at) : -1;
            const forecast = k < 0 || middle[k] == null ? "" : `forecast ${number(middle[k])} [${number(low[k])}, ${number(high[k])}]`;
            return { layer, text: [ahead ? "" : number(drawn.ratios[layer - 1][measured]), forecast].filter(Boolean).join(", ") };
          });
          return { at, lines };
        };
        chart.told = told;
        chart.scale = x;
        return {
          grid: grid({ bottom: drawn.steps.length > CONTEXT ? 78 : 44 }), series,
          dataZoom: drawn.steps.length > CONTEXT ? [{ type: "slider", filterMode: "none", height: 16, bottom: 8, showDetail: false, borderColor: css("--line") }] : [],
          xAxis: axis(x, state.x === "log" ? "step (logarithmic)" : "step", short, across()), yAxis: axis(y, "largest / median", short, upward()),
          tooltip: tooltip("axis", (params) => {
            const found = told(x.back(params[0].axisValue));
            return `<b>step ${whole(found.at)}</b>` + found.lines.map((l) => `<br>${chart.swatch(l.layer)}layer ${l.layer}: ${l.text}`).join("");
          }),
        };
      },

      track() {
        const layer = chosen[0] ?? byRatio[0], own = drawn.ratios[layer - 1];
        $("[data-focus]", article).textContent = layer;
        const x = steps("linear", 0, drawn.steps.at(-1)), y = ratios([own, ...track.map((t) => t.bands[1][layer - 1])]);
        const series = track.flatMap((t, i) => {
          const [low, middle, high] = t.bands.map((b) => b[layer - 1]), color = hue(1 + i % (HUES - 1));
          return [area(edges(x, y, t.steps, low, high), color, 0.1), line(points(x, y, t.steps, middle), color, { z: 3, lineStyle: { width: 1.5, type: "dashed", color } })];
        });
        series.push(line(points(x, y, drawn.steps, own), hue(0), { z: 4 }));
        return {
          grid: grid(), series, xAxis: axis(x, "step", short, across()), yAxis: axis(y, "largest / median", short, upward()),
          tooltip: tooltip("axis", (params) => {
            const k = nearest(drawn.steps, x.back(params[0].axisValue)), at = drawn.steps[k];
            return `<b>step ${whole(at)}</b><br>came: ${number(own[k])}` + track.filter((t) => t.at < at).map((t) => {
              const [low, middle, high] = t.bands.map((b) => b[layer - 1][nearest(t.steps, at)]);
              return `<br>from step ${whole(t.at)}: ${number(middle)} [${number(low)}, ${number(high)}]`;
            }).join("");
          }),
        };
      },

      map() {
        const shown = drawn.maps.shown[state.map] ?? drawn.maps.shown[0], at = drawn.maps.steps;
        return heat(at.map(short), shown.values, {
          log: shown.log, xName: "step", y: layersAxis(1, many), words: (i, j, v) => `layer ${j + 1}, step ${whole(at[i])}<br>${shown.title}: <b>${number(v)}</b>`,
        });
      },
      strip0: () => strip(0),
      strip1: () => strip(1),
      strip2: () => strip(2),
      sizes0: () => sizes(0),
      sizes1: () => sizes(1),
    };

    function sizes(which) {
      const { lines, median } = drawn.sizes[which];
      const y = ratios(drawn.sizes.flatMap((s) => [...s.lines, s.median]));
      const names = ["largest", "second", "third", "median"], all = [...lines, median];
      const color = (k) => k === lines.length ? css("--cm") : css("--c" + k);
      return {
        grid: grid(), xAxis: layersAxis(drawn.first_layer, median.length), yAxis: axis(y, "|h|", short, upward()),
        tooltip: tooltip("axis", ([p]) => `<b>layer ${drawn.first_layer + p.dataIndex}</b>` + all.map((own, k) => `<br>${k === lines.length ? "median" : names[k]}: ${number(own[p.dataIndex])}`).join("")),
        series: all.map((own, k) => line(own.map((v) => v == null ? null : y.at(v)), color(k), {
          sampling: undefined, showSymbol: median.length <= 40, z: 6 - k, lineStyle: { width: 1.6, type: k === lines.length ? "dashed" : "solid", color: color(k) },
        })),
      };
    }

    function strip(which) { // a row a run of the page
      const shown = all.filter((one) => one.drawn), names = shown.map((one) => one.label), { title, log } = drawn.strips[which];
      const columns = Array.from({ length: Math.max(...shown.map((one) => one.rows.length)) }, (_, i) => String(i + 1));
      return heat(columns, shown.map((one) => one.drawn.strips[which].values), {
        log, xName: "layer", names, words: (i, j, v) => `${echarts.format.encodeHTML(names[j])}, layer ${i + 1}<br>${title}: <b>${number(v)}</b>`,
      });
    }

    function heat(columns, values, { log, xName, y, names = [], words }) {
      const place = (v) => log ? (v > 0 ? Math.log10(v) : null) : v, cells = [];
      values.forEach((own, j) => own.forEach((v, i) => { if (v != null && place(v) != null) cells.push([i, j, place(v), v]); }));
      let [low, high] = extent(cells.map((c) => c[2]));
      if (!cells.length) [low, high] = [0, 1];
      if (high - low < 1e-9) [low, high] = [low - 0.5, high + 0.5];
      const several = names.length > 1, label = { color: css("--soft"), width: 70, overflow: "truncate" };
      return {
        grid: grid({ left: y ? 52 : several ? 84 : 12, bottom: 74 }),
        xAxis: { type: "category", data: columns, name: xName, nameLocation: "middle", nameGap: 24, nameTextStyle: { color: css("--soft") }, axisLabel: { color: css("--soft"), hideOverlap: true }, axisTick: { show: false }, axisLine: { show: false }, splitArea: { show: true, areaStyle: { color: [css("--panel")] } } },
        yAxis: y ?? { type: "category", data: names, show: several, inverse: true, axisLabel: label, axisTick: { show: false }, axisLine: { show: false } },
        tooltip: tooltip("item", (p) => words(p.value[0], p.value[1], p.value[3])),
        visualMap: {
          min: low, max: high, dimension: 2, orient: "horizontal", left: "center", bottom: 0, itemWidth: 10, itemHeight: 150, calculable: false, inRange: { color: VIRIDIS },
          text: [short(log ? 10 ** high : +high.toPrecision(3)), short(log ? 10 ** low : +low.toPrecision(3)) + (log ? " (log)" : "")], textStyle: { color: css("--soft") }, hoverLink: false,
        },
        series: [{ type: "heatmap", data: cells, progressive: 0, emphasis: { itemStyle: { borderColor: css("--ink"), borderWidth: 1 } }, itemStyle: names.length ? { borderColor: css("--paper"), borderWidth: 1 } : {} }],
      };
    }

    // ---- drawing: a chart is made when it comes into sight
    function draw(el) {
      let chart = charts.get(el);
      if (!chart) {
        if (el.dataset.chart.startsWith("strip")) el.style.height = 94 + 18 * all.length + "px";
        if (el.dataset.chart === "map") el.style.height = Math.max(230, Math.min(600, 110 + 15 * many)) + "px";
        chart = echarts.init(el, null, { renderer: "canvas" });
        chart.swatch = (layer) => `<i class="k${chosen.indexOf(layer) % HUES}"></i>`;
        charts.set(el, chart);
      }
      chart.setOption({ animation: false, ...options[el.dataset.chart](chart) }, { notMerge: true });
      el.dataset.drawn = "";
      return chart;
    }
    const redraw = (kinds) => charts.forEach((_, el) => { if (!kinds || kinds.includes(el.dataset.chart)) draw(el); });
    const sight = new IntersectionObserver((entries) => entries.forEach((e) => { if (e.isIntersecting && !charts.has(e.target)) draw(e.target); }), { rootMargin: "300px" });
    $$(".chart", article).forEach((el) => sight.observe(el));
    new ResizeObserver(() => charts.forEach((chart) => chart.resize())).observe(article);
    addEventListener("beforeprint", () => { if (!article.hidden) $$(".chart", article).forEach((el) => draw(el).getZr().refreshImmediately()); });

    // ---- what can be chosen
    function choose(layers) {
      chosen = layers;
      kept.write("layers " + id, chosen);
      $$(".chips button", article).forEach((chip) => {
        const on = chosen.includes(+chip.dataset.layer);
        chip.setAttribute("aria-pressed", String(on));
        if (on) chip.style.setProperty("--chip", colour(+chip.dataset.layer));
      });
      redraw(["trajectories", "track"]);
    }
    $(".chips", article).addEventListener("click", (event) => {
      const layer = +(event.target.dataset.layer ?? 0);
      if (layer) choose(chosen.includes(layer) ? chosen.filter((l) => l !== layer) : [...chosen, layer]);
    });
    $$("[data-set]", article).forEach((control) => {
      const name = control.dataset.set, box = control.type === "checkbox";
      if (box) control.checked = state[name]; else control.value = String(state[name]);
      control.addEventListener("change", () => {
        state[name] = box ? control.checked : name === "x" ? control.value : +control.value;
        kept.write("state " + id, state);
        redraw([name === "map" ? "map" : "trajectories"]);
      });
    });
    $$(".pick", article).forEach((button) => button.addEventListener("click", () => {
      choose([+button.textContent]);
      $(".trajectories", article).scrollIntoView();
    }));

    // ---- reading measurements out by the arrow keys
    const reader = $("[data-chart=trajectories]", article);
    let cursor = drawn.steps.length;
    reader.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key], chart = charts.get(reader);
      if (!move || !chart) return;
      event.preventDefault();
      const stops = [...drawn.steps, ...drawn.future];
      cursor = Math.max(0, Math.min(stops.length - 1, cursor + move));
      const found = chart.told(stops[cursor]);
      $("[data-live]", article).textContent = `step ${whole(found.at)}: ` + found.lines.map((l) => `layer ${l.layer} ${l.text}`).join("; ");
      chart.dispatchAction({ type: "showTip", x: chart.convertToPixel({ xAxisIndex: 0 }, chart.scale.at(stops[cursor])), y: 60 });
    });
    choose(chosen);
    return { redraw: () => { choose(chosen); redraw(); }, show: () => charts.forEach((chart) => chart.resize()) };
  }

  // ---- tables
  function sortable(table) {
    const heads = $$("th", table), body = $("tbody", table);
    heads.forEach((head, column) => $("button", head).addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.v;
      const compare = (a, b) => {
        const [u, v] = [value(a), value(b)];
        if (u === "" || v === "") return (u === "") - (v === ""); // what is not known comes last either way
        const order = isNaN(u) || isNaN(v) ? u.localeCompare(v) : u - v;
        return down ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    }));
  }

  // ---- the page
  const system = matchMedia("(prefers-color-scheme: dark)");
  root.dataset.theme = kept.read("theme", system.matches ? "dark" : "light");
  $$(".sortable").forEach(sortable);
  $$("details").forEach((details, i) => {
    details.open = kept.read("open " + i, false);
    details.addEventListener("toggle", () => kept.write("open " + i, details.open));
  });
  const data = $$(".data").map((own) => JSON.parse(own.textContent));
  const views = $$(".run").map((article, i) => view(article, i, data));
  const theme = (name) => { root.dataset.theme = name; views.forEach((one) => one.redraw()); };
  system.addEventListener("change", () => { if (!kept.read("theme", null)) theme(system.matches ? "dark" : "light"); });
  $("#theme").addEventListener("click", () => {
    const name = root.dataset.theme === "dark" ? "light" : "dark";
    kept.write("theme", name);
    theme(name);
  });
  function tab(index) {
    $$(".run").forEach((article, i) => { article.hidden = i !== index; });
    $$("[data-tab]").forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
    kept.write("tab", index);
    views[index].show();
  }
  $$("[data-tab]").forEach((button, i) => button.addEventListener("click", () => tab(i)));
  if (views.length > 1) tab(Math.min(kept.read("tab", 0), views.length - 1));
  if (root.dataset.refresh) {
    const live = $("#live");
    live.addEventListener("click", () => live.setAttribute("aria-pressed", String(live.getAttribute("aria-pressed") !== "true")));
    setInterval(() => { if (live.getAttribute("aria-pressed") === "true" && !document.hidden) location.reload(); }, 1000 * root.dataset.refresh);
  }
  root.dataset.ready = "";
})();
