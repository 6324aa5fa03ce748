// The map of the search page: outlines of images, a box as a filter, coastlines and a grid of degrees.
// Nothing is asked of another host unless the page names a base map.
"use strict";

const LAND_ZOOM = 6; // coastlines of 1:110,000,000 are wrong by more than some pixels beyond
const GRID_STEPS = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30];
const EDGE = 85.0511; // degrees north and south where the map ends

class SearchMap {
  // props.value: {view, features, base}, with longitudes that go on beyond 180 degrees; props.chosen: index of a hit.
  constructor(element, props, trigger) {
    this.props = props;
    this.trigger = trigger;
    this.markers = [];
    this.outlines = L.featureGroup();
    this.box = null;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const motion = still ? { zoomAnimation: false, fadeAnimation: false, markerZoomAnimation: false, inertia: false } : {};
    this.place = element.querySelector(".map");
    this.map = L.map(this.place, { ...motion, scrollWheelZoom: false, attributionControl: false, boxZoom: false, zoomSnap: 0.25 });
    this.map.on("focus", () => this.map.scrollWheelZoom.enable()).on("blur", () => this.map.scrollWheelZoom.disable());
    this.map.fitWorld();
    L.control.scale({ imperial: false }).addTo(this.map);
    this.land = L.layerGroup();
    this.grid = L.layerGroup().addTo(this.map);
    this.outlines.addTo(this.map);
    this.map.on("moveend", () => this.drawGrid());
    for (const moved of ["pointerdown", "wheel", "keydown"]) this.place.addEventListener(moved, () => (this.view = null), true);
    new ResizeObserver(() => this.fit()).observe(this.place);
    for (const name of ["draw", "here", "clear"]) {
      element.querySelector(`.${name}`).addEventListener("click", () => this[name]());
    }
    this.place.addEventListener("pointerdown", (event) => this.begin(event), true);
    this.place.addEventListener("keydown", (event) => event.key === "Escape" && this.drawing(false));
    this.show();
    if (!props.value.base) this.loadLand();
  }

  async loadLand() {
    const answer = await fetch("web/land.json");
    if (!answer.ok) return;
    const land = await answer.json();
    for (const turn of [-360, 0, 360]) {
      const coordsToLatLng = ([x, y]) => L.latLng(y, x + turn);
      L.geoJSON(land, { coordsToLatLng, interactive: false, style: { className: "land" } }).addTo(this.land);
    }
    this.drawGrid();
  }

  show() {
    const { view, features, base } = this.props.value;
    if (base && !this.tiles) {
      this.tiles = L.tileLayer(base.url, { maxZoom: 22, maxNativeZoom: 18 }).addTo(this.map);
      L.control.attribution({ prefix: false }).addAttribution(base.credit).addTo(this.map);
    }
    this.outlines.clearLayers();
    this.markers = features.map((feature) => this.addOutline(feature));
    this.view = view ?? this.view;
    this.fit();
    this.choose(this.props.chosen);
  }

  // Shows the view again where the map has another size, until somebody moves the map.
  fit() {
    this.map.invalidateSize({ pan: false });
    if (!this.view) return;
    const [west, south, east, north] = this.view;
    this.map.fitBounds([[south, west], [north, east]], { padding: [28, 28], maxZoom: 18, animate: false });
  }

  addOutline({ geometry, properties }) {
    const chosen = () => this.trigger("select", properties);
    const text = document.createElement("span"); // names of files are text, never HTML
    text.textContent = properties.label;
    const coordsToLatLng = ([x, y]) => L.latLng(y, x);
    const outline = L.geoJSON(geometry, {
      coordsToLatLng,
      style: { className: "outline" },
      pointToLayer: (_, place) => L.circleMarker(place, { radius: 5, className: "outline" }),
    });
    const icon = L.divIcon({ className: "rank", html: String(properties.index + 1), iconSize: [24, 24] });
    const marker = L.marker(outline.getBounds().getNorthWest(), { icon, zIndexOffset: -10 * properties.index, riseOnHover: true });
    for (const layer of [outline, marker]) {
      layer.bindTooltip(text.cloneNode(true), { direction: "top" }).on("click", chosen).addTo(this.outlines);
    }
    marker.on("keypress", ({ originalEvent: event }) => {
      if (![" ", "Enter"].includes(event.key)) return;
      event.preventDefault();
      chosen();
    });
    marker.getElement().setAttribute("aria-label", properties.label);
    return { outline, marker, index: properties.index };
  }

  choose(index) {
    for (const { outline, marker, index: own } of this.markers) {
      const is = own === index;
      marker.getElement().classList.toggle("chosen", is);
      marker.getElement().setAttribute("aria-pressed", String(is));
      marker.setZIndexOffset(is ? 10000 : -10 * own);
      outline.eachLayer((layer) => {
        layer.getElement()?.classList.toggle("chosen", is);
        if (is) layer.bringToFront();
      });
      if (is && !this.map.getBounds().contains(marker.getLatLng())) this.map.panTo(marker.getLatLng());
    }
  }

  // A box: [west, south, east, north] in degrees, west above east across the antimeridian; null for none.
  showBox(text) {
    this.box?.remove();
    this.box = null;
    const sides = String(text ?? "").trim().split(/[\s,;]+/).map(Number);
    if (sides.length !== 4 || !sides.every(Number.isFinite)) return;
    let [west, south, east, north] = sides;
    if (west > east) east += 360;
    const turn = 360 * Math.round((this.map.getCenter().lng - (west + east) / 2) / 360);
    const bounds = L.latLngBounds([[south, west + turn], [north, east + turn]]);
    this.box = L.rectangle(bounds, { className: "box", interactive: false }).addTo(this.map);
  }

  setBox(bounds) {
    this.drawing(false);
    this.trigger("input", { box: bounds && this.sidesOf(bounds) });
  }

  sidesOf(bounds) {
    const turned = (x) => Number(((((x + 180) % 360) + 360) % 360 - 180).toFixed(5));
    const south = Math.max(bounds.getSouth(), -90), north = Math.min(bounds.getNorth(), 90);
    const all = bounds.getEast() - bounds.getWest() >= 360;
    const lat = [south <= -EDGE ? -90 : south, north >= EDGE ? 90 : north].map((y) => Number(y.toFixed(5)));
    return [all ? -180 : turned(bounds.getWest()), lat[0], all ? 180 : turned(bounds.getEast()), lat[1]].join(", ");
  }

  draw() {
    this.drawing(!this.isDrawing);
  }

  here() {
    this.setBox(this.map.getBounds());
  }

  clear() {
    this.setBox(null);
  }

  drawing(on) {
    this.isDrawing = on;
    this.place.classList.toggle("drawing", on);
    this.place.closest(".map-and-buttons").querySelector(".draw").setAttribute("aria-pressed", String(on));
    for (const way of ["dragging", "touchZoom", "doubleClickZoom"]) this.map[way]?.[on ? "disable" : "enable"]();
  }

  begin(event) {
    if (!this.isDrawing || !event.isPrimary || event.button !== 0 || event.target.closest(".leaflet-control")) return;
    event.preventDefault();
    event.stopPropagation();
    this.place.setPointerCapture(event.pointerId);
    const at = (moved) => this.map.containerPointToLatLng(this.map.mouseEventToContainerPoint(moved));
    const first = at(event), drawn = L.rectangle([first, first], { className: "box", interactive: false }).addTo(this.map);
    const move = (moved) => drawn.setBounds(L.latLngBounds(first, at(moved)));
    const end = (last) => {
      for (const [name, listener] of listeners) this.place.removeEventListener(name, listener);
      drawn.remove();
      const far = Math.hypot(last.clientX - event.clientX, last.clientY - event.clientY) > 5; // a click draws no box
      if (last.type === "pointerup" && far) this.setBox(L.latLngBounds(first, at(last)));
    };
    const listeners = [["pointermove", move], ["pointerup", end], ["pointercancel", end]];
    for (const [name, listener] of listeners) this.place.addEventListener(name, listener);
  }

  drawGrid() {
    this.grid.clearLayers();
    if (this.tiles) return;
    if (this.map.getZoom() < LAND_ZOOM) this.land.addTo(this.map);
    else this.land.remove();
    const seen = this.map.getBounds(), size = this.map.getSize();
    const wanted = ((seen.getEast() - seen.getWest()) * 90) / Math.max(size.x, 1);
    const step = GRID_STEPS.find((each) => each >= wanted) ?? 30;
    const digits = Math.max(0, Math.ceil(-Math.log10(step)));
    const line = (from, to) => L.polyline([from, to], { className: "grid", interactive: false }).addTo(this.grid);
    const label = (place, text, kind) =>
      L.marker(place, { icon: L.divIcon({ className: `degrees ${kind}`, html: text, iconSize: null }), interactive: false, keyboard: false }).addTo(this.grid);
    for (let x = Math.ceil(seen.getWest() / step) * step; x <= seen.getEast(); x += step) {
      line([seen.getSouth(), x], [seen.getNorth(), x]);
      const degrees = ((((x + 180) % 360) + 360) % 360) - 180;
      label([seen.getSouth(), x], `${Math.abs(degrees).toFixed(digits)}°${degrees < 0 ? "W" : "E"}`, "below");
    }
    const south = Math.max(seen.getSouth(), -EDGE), north = Math.min(seen.getNorth(), EDGE);
    for (let y = Math.ceil(south / step) * step; y <= north; y += step) {
      line([y, seen.getWest()], [y, seen.getEast()]);
      label([y, seen.getWest()], `${Math.abs(y).toFixed(digits)}°${y < 0 ? "S" : "N"}`, "left");
    }
  }
}

window.startSearchMap = (element, props, trigger, watch) => {
  window.searchMap = new SearchMap(element, props, trigger);
  watch("value", () => window.searchMap.show());
  watch("chosen", () => window.searchMap.choose(props.chosen));
};
