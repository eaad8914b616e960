//! What a plan predicts, against what a step takes and what it was told.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

use std::process::Command;

use serde_json::Value;

/// The last line of what the command prints, which `--json` makes an object.
fn json(args: &[&str], sets: &[&str]) -> Value {
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let output = Command::new(env!("CARGO_BIN_EXE_patrickstar")).args(args).args(sets).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().unwrap_or_default())
        .unwrap_or_else(|error| panic!("{error}: {text}\n{}", String::from_utf8_lossy(&output.stderr)))
}

/// A GPT on a GPU that needs not be there, with rates that somebody told.
fn on_a_gpu(rates: [&str; 3], sets: &[&str]) -> Value {
    let [compute, link, host] = rates;
    beside(&["--compute", compute, "--link", link, "--host", host], sets)
}

fn beside(rates: &[&str], sets: &[&str]) -> Value {
    let args = [&["plan", "--json"], rates].concat();
    let model =
        ["compute.device=cuda", "model.preset=1b", "model.precision=bf16", "train.seq_len=1024", "train.clip_norm=0"];
    json(&args, &[&model, sets].concat())
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn a_step_on_a_gpu_takes_as_long_as_what_it_waits_for() {
    let resident = ["memory.device=60GB", "train.batch=16"];
    let plan = on_a_gpu(["500", "40", "100"], &resident);
    assert_eq!(plan["fits"], true, "{plan}");
    // A layer that is computed again leaves out the second product of its MLP.
    let (layers, width, tokens, time) = (number(&plan["layers"]), 2048.0, 16.0 * 1024.0, 1024.0);
    let again = (layers - number(&plan["kept_layers"])) * 2.0 * tokens * width * (8.0 * width + time);
    let compute = (number(&plan["flops"]) + again) / 500e12;
    assert!((number(&plan["bound"]["compute_s"]) / compute - 1.0).abs() < 1e-6, "{plan}");
    // What runs between products takes time too.
    let share = compute / number(&plan["predicted_step_s"]);
    assert!((0.85..1.0).contains(&share), "{share} of {plan}");
    // With a fraction of the device the host steps, and is what a small batch waits for.
    let streamed = ["memory.device=8GB", "memory.host=40GB", "train.batch=2"];
    let [slow, fast] = ["40", "80"].map(|host| number(&on_a_gpu(["500", "40", host], &streamed)["predicted_step_s"]));
    assert!(slow > 1.5 * fast, "{slow} s beside {fast} s");
    // What computes on the host is not guessed.
    assert!(json(&["plan", "--json"], &["model.preset=tiny", "train.seq_len=128"])["predicted_step_s"].is_null());
}

#[test]
fn gradients_that_find_no_place_make_a_step_longer() {
    // 21 billion parameters fill the device and host memory.
    let with = |host: &str| {
        let sets = ["model.preset=20b", "memory.device=148GB", "train.batch=8", "train.recompute=full", host];
        on_a_gpu(["620", "43", "115"], &sets)
    };
    let [tight, roomy] = ["memory.host=125GB", "memory.host=160GB"].map(with);
    for plan in [&tight, &roomy] {
        assert_eq!((&plan["fits"], &plan["split"]), (&Value::Bool(true), &roomy["split"]), "{plan}");
    }
    assert!(number(&tight["predicted_step_s"]) > 1.1 * number(&roomy["predicted_step_s"]), "{tight}\n{roomy}");
}

#[test]
fn what_a_device_is_too_small_for_is_told_so_that_it_then_fits() {
    let sets = ["compute.device=cuda", "memory.share=dynamic"];
    let refused = json(&["plan", "--json"], &[&sets[..], &["memory.device=39MB"]].concat());
    let reason = refused["problems"][0].as_str().unwrap();
    let least = reason.split("memory.device to at least ").nth(1).unwrap().split(',').next().unwrap();
    let device = format!("memory.device={least}");
    let plan = json(&["plan", "--json"], &[&sets[..], &[&device]].concat());
    assert_eq!(plan["fits"], true, "{reason}\n{plan}");
}

#[test]
fn inputs_that_wait_in_host_memory_are_part_of_what_it_may_take() {
    let away = ["memory.device=8GB", "memory.host=24GB", "train.batch=32", "train.boundaries=host"];
    let plan = on_a_gpu(["500", "40", "100"], &away);
    let host = &plan["tiers"][1];
    let inputs = 19.0 * 32.0 * 1024.0 * 2048.0 * 2.0;
    assert!(number(&host["non_model"]) >= inputs, "{host}");
    assert!(number(&host["chunk_budget"]) + number(&host["non_model"]) <= 24e9, "{host}");
}

/// A step of the smallest shape, with fewer words than it has.
fn step(batch: &str, sets: &[&str]) -> Value {
    let args = ["bench", "step", "--shape", "tiny", "--batch", batch, "--steps", "1", "--json"];
    let small = ["memory.device=200MB", "model.vocab=512", "train.seq_len=128"];
    json(&args, &[&small, sets].concat())
}

#[test]
fn a_measured_step_says_what_peers_are_compared_by_and_what_was_predicted() {
    let step = step("2", &[]);
    for key in [
        "params_b",
        "step_s",
        "median_s",
        "tflops",
        "tok_s",
        "gpu_peak_gb",
        "rss_peak_gb",
        "loss",
        "kernels",
        "h2d_gb",
        "d2h_gb",
        "activations_out_gb",
        "activations_back_gb",
        "link_gbps",
        "stall_ratio",
        "stall_by_cause",
        "predicted_step_s",
        "predicted_peaks",
        "measured_peaks",
        "placement",
        "recompute",
    ] {
        assert!(step.get(key).is_some(), "{key}: {step}");
    }
    // Six per weight and token and causal attention, as the harness of the peers counts.
    let [layers, width, vocabulary, time] = [4.0, 256.0, 512.0, 128.0];
    let a_token = 6.0 * (12.0 * layers * width * width + vocabulary * width) + 6.0 * layers * time * width;
    let ratio = number(&step["tflops"]) * 1e12 / (number(&step["tok_s"]) * a_token);
    assert!((ratio - 1.0).abs() < 1e-9, "{ratio}");
}

#[test]
fn inputs_of_many_micro_batches_on_their_way_back_find_their_place() {
    let step = step("16", &["train.micro_batches=16", "train.boundaries=host", "train.recompute=full"]);
    let (peak, predicted) = (number(&step["non_model_peak_gb"]), number(&step["non_model_predicted_gb"]));
    assert!(peak > 0.0 && peak <= predicted, "{peak} GB of {predicted} GB");
    // The inputs of one layer, of the two before it, and a gradient, of 16 micro-batches, are most of it.
    assert!(peak > 0.5 * predicted, "{peak} GB of {predicted} GB");
    assert_eq!(step["recompute"]["inputs_in_host_memory"], 4, "{step}");
    let inputs = 4.0 * 16.0 * 128.0 * 256.0 * 4.0 / 1e9;
    for key in ["activations_out_gb", "activations_back_gb"] {
        assert!((number(&step[key]) - inputs).abs() < 1e-9, "{key}: {step}");
    }
}

#[test]
fn chunks_leave_the_device_for_activations_where_the_host_hides_their_updates() {
    // Two cores step, at the rate that is assumed of any where no GPU is at hand.
    let with = |sets: &[&str]| {
        let model = ["model.preset=20b", "train.batch=16", "memory.device=278GB", "actors.optimizer.threads=2"];
        let plan = beside(&[], &[&model, sets].concat());
        assert_eq!(plan["fits"], true, "{plan}");
        (number(&plan["kept_layers"]), number(&plan["split"]["resident"]), number(&plan["predicted_step_s"]))
    };
    let (kept, resident, step) = with(&["memory.host=60GB"]);
    let (none, all, again) = with(&["memory.host=60GB", "train.recompute=full"]);
    assert!(kept > none && resident < all && step < 0.97 * again, "{kept} {resident} {step} {again}");
    // Not where host memory has no place for their states.
    let (beside_all, everything, _) = with(&["memory.host=2GB"]);
    assert!(everything == all && beside_all < kept, "{everything} {beside_all}");
}
