"use strict";

// Speaks the JSON of TensorFlow Serving's REST API with the server that sent this page.

const $ = (id) => document.getElementById(id);
const state = { model: "", shape: [], signatures: {}, chosen: null, frames: null, image: null, corrupted: null };
const RESTORED = 4; // samples of the clean image that are asked for
const LARGEST_FILE = 50e6;

// Talking to the server.

async function ask(path, body) {
  const options = body && { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" } };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server cannot be reached.");
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(content.error || `The server answered ${answer.status}.`);
  return content;
}

async function predict(signature, inputs) {
  const path = `v1/models/${encodeURIComponent(state.model)}:predict`;
  return (await ask(path, { signature_name: signature, inputs })).outputs;
}

// One thing at a time: buttons rest while the server works, and what went wrong is said.
async function work(message, task) {
  const buttons = [...document.querySelectorAll(".controls button:enabled")];
  buttons.forEach((b) => (b.disabled = true));
  say(message);
  try {
    await task();
    say("");
  } catch (error) {
    say(error.message, true);
  } finally {
    buttons.forEach((b) => (b.disabled = false));
    $("corrupt").disabled = !state.image;
    $("restore").disabled = !state.corrupted;
  }
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// Pictures: nested lists [H][W][C] of floats (0 to 1) ↔ canvases.

function paint(canvas, image, low = 0, high = 1) {
  const [height, width, channels] = state.shape;
  canvas.width = width;
  canvas.height = height;
  const pixels = new ImageData(width, height);
  for (let y = 0, k = 0; y < height; y++)
    for (let x = 0; x < width; x++, k += 4) {
      for (let c = 0; c < 3; c++)
        pixels.data[k + c] = (255 * (image[y][x][channels === 1 ? 0 : c] - low)) / (high - low); // clamps and rounds
      pixels.data[k + 3] = 255;
    }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// States of processes whose noise is large are shown from their least to their greatest value.
function range(image) {
  const values = image.flat(2);
  const low = values.reduce((a, b) => Math.min(a, b));
  const high = values.reduce((a, b) => Math.max(a, b));
  return high - low > 2 ? [low, high] : [0, 1];
}

function figure(id, caption, image, low, high) {
  const box = document.createElement("figure");
  const canvas = document.createElement("canvas");
  const text = document.createElement("figcaption");
  canvas.id = id;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption);
  text.textContent = caption;
  paint(canvas, image, low, high);
  box.append(canvas, text);
  return box;
}

async function read(file) {
  if (!file.type.startsWith("image/")) throw new Error(`${file.name} is not an image.`);
  if (file.size > LARGEST_FILE) throw new Error(`${file.name} is larger than 50 MB.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} cannot be read as an image.`);
  }
  const [height, width, channels] = state.shape;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const scale = Math.max(width / bitmap.width, height / bitmap.height); // cover, from the middle
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.imageSmoothingQuality = "high";
  context.fillRect(0, 0, width, height); // what is transparent lies on black
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
  const { data } = context.getImageData(0, 0, width, height);
  const value = (k) => {
    const rgb = [data[k] / 255, data[k + 1] / 255, data[k + 2] / 255];
    return channels === 1 ? [0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]] : rgb;
  };
  return Array.from({ length: height }, (_, y) => Array.from({ length: width }, (_, x) => value(4 * (y * width + x))));
}

// Samples.

const suffix = () => ($("steps").value ? `_${$("steps").value}` : "");
const whole = (id) => {
  if (!$(id).reportValidity()) throw new Error(`${$(id).labels[0].firstChild.textContent.trim()}: ${$(id).validationMessage}`);
  return Number($(id).value);
};

function listSteps() {
  const options = state.samplers.filter((s) => s.family === $("sampler").value);
  $("steps").replaceChildren(...options.map((s) => new Option(s.evaluations, s.name)));
}

function draw() {
  return work("Drawing…", async () => {
    const [count, seed] = [whole("count"), whole("seed")];
    const { images } = await predict(`sample${suffix()}`, { num: count, seed });
    $("grid").replaceChildren(
      ...images.map((image, k) => {
        const button = document.createElement("button");
        const canvas = document.createElement("canvas");
        button.type = "button";
        button.title = `Seed ${seed + k}`;
        button.setAttribute("aria-label", `Sample of seed ${seed + k}`);
        button.setAttribute("aria-pressed", "false");
        paint(canvas, image);
        button.append(canvas);
        button.addEventListener("click", () => choose(button, seed + k, image, suffix()));
        return button;
      }),
    );
  });
}

function choose(button, seed, image, sampler) {
  for (const other of $("grid").children) other.setAttribute("aria-pressed", String(other === button));
  take(image, `Sample of seed ${seed}`);
  if (!(`process${sampler}` in state.signatures)) return undefined;
  return work("Asking for the process…", async () => {
    const { times, x_t, x0_hat } = await predict(`process${sampler}`, { seeds: [seed] });
    state.frames = { times, states: x_t[0], predicted: x0_hat[0] };
    $("frame").max = times.length - 1;
    $("frame").value = 0;
    $("process-hint").textContent = `Seed ${seed}. Move the slider from noise to image.`;
    $("process").hidden = false;
    showFrame();
  });
}

function showFrame() {
  const { times, states, predicted } = state.frames;
  const k = Number($("frame").value);
  paint($("x-t"), states[k], ...range(states[k]));
  paint($("x-0"), predicted[Math.min(k, predicted.length - 1)]); // there is none for the end
  $("time").textContent = times[k].toFixed(2);
  $("frame").setAttribute("aria-valuetext", `t = ${times[k].toFixed(2)}`);
}

// What t means: level of the corruption and standard deviation of the noise, from the manifest's table.
function meaning(t) {
  const { times, level, sigma } = state.schedule;
  if (!times || !level || !sigma) return "";
  const k = Math.max(1, times.findIndex((u) => u >= t));
  const at = (values) => values[k - 1] + ((values[k] - values[k - 1]) * (t - times[k - 1])) / (times[k] - times[k - 1]);
  return ` (level ${at(level).toFixed(2)}, noise ${at(sigma).toFixed(2)})`;
}

function showLevel() {
  const t = Number($("level").value);
  $("level-text").textContent = t.toFixed(2) + meaning(t);
}

// Restoration.

function take(image, caption) {
  state.image = image;
  state.corrupted = null;
  $("restored").replaceChildren(figure("original", caption, image));
  $("corrupt").disabled = false;
  $("restore").disabled = true;
}

function takeFile(file) {
  if (file) work("Reading…", async () => take(await read(file), file.name));
}

function corrupt() {
  return work("Corrupting…", async () => {
    const t = Number($("level").value);
    const x_t = await predict("corrupt", { x_0: [state.image], t: [t], seed: whole("restore-seed") });
    state.corrupted = { image: x_t[0], t };
    const shown = figure("corrupted", `Corrupted, t = ${t.toFixed(2)}`, x_t[0], ...range(x_t[0]));
    $("restored").replaceChildren($("restored").firstElementChild, shown);
  });
}

function restore() {
  return work("Restoring…", async () => {
    const { image, t } = state.corrupted;
    const inputs = { y: [image], t, seed: whole("restore-seed"), num: RESTORED };
    const { samples, mean, std } = await predict("restore_map", inputs);
    const most = Math.max(1e-6, ...std[0].flat(2));
    const kept = [...$("restored").children].slice(0, 2);
    $("restored").replaceChildren(
      ...kept,
      ...samples[0].map((sample, k) => figure(`restored-${k}`, `Restored, sample ${k + 1}`, sample)),
      figure("mean", "Mean of the samples", mean[0]),
      figure("std", `Uncertainty, at most ${most.toFixed(2)}`, std[0], 0, most),
    );
  });
}

// Start.

async function start() {
  const { models } = await ask("v1/models");
  state.model = models[0].name;
  const { metadata } = await ask(`v1/models/${encodeURIComponent(state.model)}/metadata`);
  state.signatures = metadata.signature_def.signature_def;
  const manifest = await ask("manifest.json");
  state.shape = manifest.image_shape;
  state.schedule = manifest;
  showLevel();
  state.samplers = Object.entries(manifest.samplers)
    .filter(([name]) => `sample_${name}` in state.signatures)
    .map(([name, about]) => ({ name, family: about.sampler || name, evaluations: about.evaluations ?? "adaptive" }));
  if (!state.samplers.length) throw new Error("This model has no samplers.");
  const families = [...new Set(state.samplers.map((s) => s.family))];
  const first = state.samplers.find((s) => s.name === manifest.default_sampler) || state.samplers[0];
  $("sampler").replaceChildren(...families.map((f) => new Option(f.replaceAll("_", " "), f)));
  $("sampler").value = first.family;
  listSteps();
  $("steps").value = first.name;
  $("process-section").hidden = !(`process_${first.name}` in state.signatures);
  $("restore-section").hidden = !("corrupt" in state.signatures && "restore_map" in state.signatures);
  const [height, width, channels] = state.shape;
  $("about").textContent = `${manifest.name || state.model}: ${width} × ${height} pixels, ${channels === 1 ? "grey" : "colour"}`;
  document.body.dataset.ready = "yes";
}

$("sampler").addEventListener("change", listSteps);
$("draw-form").addEventListener("submit", (event) => (event.preventDefault(), draw()));
$("restore-form").addEventListener("submit", (event) => (event.preventDefault(), restore()));
$("corrupt").addEventListener("click", corrupt);
$("frame").addEventListener("input", showFrame);
$("level").addEventListener("input", showLevel);
$("file").addEventListener("change", () => takeFile($("file").files[0]));
for (const type of ["dragover", "dragleave", "drop"])
  window.addEventListener(type, (event) => {
    event.preventDefault(); // a file that misses the field must not replace the page
    const inside = $("drop").contains(event.target);
    $("drop").classList.toggle("over", inside && type === "dragover");
    if (type === "drop" && inside) takeFile(event.dataTransfer.files[0]);
  });
start().catch((error) => say(error.message, true));
