//! Jobs that begin with a model of this machine.

use std::collections::HashMap;
use std::os::unix::fs::symlink;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::client::Service;

/// Words of the tokenizer.
const WORDS: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

/// A GPT-2 of width 4 that says `d` whatever it reads: its last norm gives (1, 0, 0, 0), which only `d` resembles.
fn stubborn_model(directory: &Path) {
    std::fs::create_dir_all(directory).unwrap();
    let config = json!({
        "model_type": "gpt2", "vocab_size": WORDS.len(), "n_positions": 16, "n_embd": 4, "n_layer": 1, "n_head": 1,
    });
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let vocabulary: HashMap<&str, usize> = WORDS.iter().enumerate().map(|(id, word)| (*word, id)).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "a" },
    });
    std::fs::write(directory.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let mut tensors: Vec<(&str, Vec<usize>, Vec<f32>)> = Vec::new();
    for (name, shape) in [
        ("wpe.weight", vec![16, 4]),
        ("h.0.ln_1.weight", vec![4]),
        ("h.0.ln_1.bias", vec![4]),
        ("h.0.attn.c_attn.weight", vec![4, 12]),
        ("h.0.attn.c_attn.bias", vec![12]),
        ("h.0.attn.c_proj.weight", vec![4, 4]),
        ("h.0.attn.c_proj.bias", vec![4]),
        ("h.0.ln_2.weight", vec![4]),
        ("h.0.ln_2.bias", vec![4]),
        ("h.0.mlp.c_fc.weight", vec![4, 16]),
        ("h.0.mlp.c_fc.bias", vec![16]),
        ("h.0.mlp.c_proj.weight", vec![16, 4]),
        ("h.0.mlp.c_proj.bias", vec![4]),
        ("ln_f.weight", vec![4]),
    ] {
        let elements = shape.iter().product();
        tensors.push((name, shape, vec![0.0; elements]));
    }
    let mut embedding = vec![0.0; 4 * WORDS.len()];
    embedding[4 * 3] = 5.0;
    tensors.push(("wte.weight", vec![WORDS.len(), 4], embedding));
    tensors.push(("ln_f.bias", vec![4], vec![1.0, 0.0, 0.0, 0.0]));
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape, values)| {
            (name.to_owned(), shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
        })
        .collect();
    let views =
        bytes.iter().map(|(name, shape, data)| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    std::fs::write(directory.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn a_job_begins_with_the_weights_of_a_directory() {
    let place = tempfile::tempdir().unwrap();
    let (root, data) = (place.path().join("models"), place.path().join("data"));
    stubborn_model(&root.join("stubborn"));
    stubborn_model(&place.path().join("outside"));
    symlink(place.path().join("outside"), root.join("escape")).unwrap();
    let service = Service::start_with(&data, &["--model-root", root.to_str().unwrap()], None);
    let models = service.get("/v1/models").ok();
    let listed = |id: &str| models["data"].as_array().unwrap().iter().any(|model| model["id"] == id);
    assert!(listed("stubborn") && listed("gpt-tiny") && !listed("escape"), "{models}");

    let text = format!("{}\n", json!({ "text": "d ".repeat(200) }));
    let file = service.upload("d.jsonl", "fine-tune", text.as_bytes()).ok()["id"].clone();
    let create = |model: &str| {
        let settings = json!({ "train.steps": 2, "train.batch": 4 });
        service.post("/v1/fine_tuning/jobs", &json!({ "model": model, "training_file": file, "patrickstar": settings }))
    };
    let job = create("stubborn").ok();
    let id = job["id"].as_str().unwrap();
    let done = service.until_status(id, "succeeded");
    // Seven other words of logit 0 beside one of logit 5.
    let expected = (1.0 + 7.0 * (-5.0f64).exp()).ln();
    let first = f64::from_bits(service.losses(id)[0].1);
    assert!((first - expected).abs() < 1e-6, "{first} instead of {expected}");
    let model = done["fine_tuned_model"].as_str().unwrap();
    assert!(model.starts_with("ft:stubborn:"), "{model}");
    let wish = json!({ "model": model, "prompt": "a b", "max_tokens": 3, "temperature": 0 });
    assert_eq!(service.post("/v1/completions", &wish).ok()["choices"][0]["text"], "d d d");

    for (model, expected) in [
        ("escape", "leads out of its root"),
        ("../outside", "no such model"),
        ("stubborn/../../outside", "no such model"),
        (place.path().join("outside").to_str().unwrap(), "no such model"),
    ] {
        let message = create(model).error(400);
        assert!(message.contains(expected), "{model}: {message}");
    }
    let plan = service.post("/v1/patrickstar/plan", &json!({ "model": "stubborn" })).ok();
    assert_eq!(plan["fits"], true);
    let own_path = json!({ "model": "gpt-tiny", "patrickstar": { "model.path": root } });
    assert!(service.post("/v1/patrickstar/plan", &own_path).error(400).contains("cannot be set by a job"));
}
