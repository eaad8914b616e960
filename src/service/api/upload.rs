//! Uploads: streamed to a file whose name the service chose, and stored once they are safe on disk.

use std::path::PathBuf;

use actix_multipart::{Field, Multipart};
use actix_web::http::header::CONTENT_LENGTH;
use actix_web::{HttpRequest, web};
use futures_util::TryStreamExt;
use tokio::io::AsyncWriteExt;
use utoipa::ToSchema;

use super::State;
use super::pace::was_too_slow;
use super::view::File;
use crate::service::error::ServiceError;
use crate::service::settings::Limits;
use crate::service::store::{FileId, Purpose};

/// Parts of a form.
const MOST_FIELDS: usize = 16;
/// Bytes of a part that is not the file.
const MOST_TEXT: usize = 4096;
/// Characters that are kept of the client's name for a file.
const MOST_NAME: usize = 255;

/// The form, for the document.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the form is read part by part, never as a whole")]
pub(super) struct UploadForm {
    /// `fine-tune`.
    purpose: String,
    /// Lines of JSON.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
}

/// A form that is being received. What was received of a file is removed unless it is stored in the end.
struct Receipt {
    path: PathBuf,
    /// The client's name for the file, and its bytes.
    file: Option<(String, u64)>,
    purpose: Option<String>,
    kept: bool,
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if !self.kept && self.file.is_some() {
            // What cannot be removed now is removed at the next start.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

/// Stores a file to train on.
#[utoipa::path(post, path = "/v1/files", tag = "files",
    request_body(content = UploadForm, content_type = "multipart/form-data"), responses((status = 200, body = File)))]
pub(super) async fn create(
    state: web::Data<State>,
    request: HttpRequest,
    form: Multipart,
) -> Result<web::Json<File>, ServiceError> {
    if *state.stopping.borrow() {
        return Err(ServiceError::Stopping);
    }
    let limits = state.settings.limits;
    check_room(&state, &request)?;
    let id = FileId::random()?;
    let mut receipt = Receipt { path: state.settings.file(&id), file: None, purpose: None, kept: false };
    receive(form, &mut receipt, &limits).await?;
    let purpose = receipt.purpose.as_deref().unwrap_or_default();
    if purpose != Purpose::FineTune.name() {
        let message = format!("`purpose` is `{purpose}`: only fine-tune is supported");
        return Err(ServiceError::invalid("purpose", message));
    }
    let (name, bytes) = receipt.file.clone().ok_or_else(|| ServiceError::invalid("file", "the form has no `file`"))?;
    if bytes == 0 {
        return Err(ServiceError::invalid("file", "the file is empty: upload lines of JSON"));
    }
    // The content is synced; now its name.
    let directory = state.settings.files();
    let sync = tokio::fs::File::open(&directory).await;
    match sync {
        Ok(folder) => folder.sync_all().await,
        Err(error) => Err(error),
    }
    .map_err(|error| ServiceError::io(&directory, error))?;
    let row = state.store.write(move |store| store.add_file(&id, &name, Purpose::FineTune, bytes)).await?;
    receipt.kept = true;
    Ok(web::Json(File::from(&row)))
}

/// Refuses before the first byte what is declared too large for the limit or the disk.
fn check_room(state: &State, request: &HttpRequest) -> Result<(), ServiceError> {
    let limits = &state.settings.limits;
    let declared = request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let need = declared.unwrap_or(0);
    if need > limits.upload.saturating_add(1 << 20) {
        return Err(ServiceError::TooLarge { what: "file", limit: limits.upload });
    }
    let data = &state.settings.data;
    let disk = rustix::fs::statvfs(data).map_err(|error| ServiceError::io(data, error.into()))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free < need.saturating_add(limits.disk_reserve) { Err(ServiceError::DiskFull { need }) } else { Ok(()) }
}

async fn receive(mut form: Multipart, receipt: &mut Receipt, limits: &Limits) -> Result<(), ServiceError> {
    for _ in 0..MOST_FIELDS {
        let Some(mut field) = form.try_next().await.map_err(malformed)? else { return Ok(()) };
        match field.name().unwrap_or_default() {
            "file" if receipt.file.is_none() => {
                let name = field.content_disposition().and_then(|header| header.get_filename());
                let name: String = name.unwrap_or("file").chars().take(MOST_NAME).collect();
                receipt.file = Some((name, 0));
                let bytes = receive_file(&mut field, &receipt.path, limits).await?;
                if let Some(file) = &mut receipt.file {
                    file.1 = bytes;
                }
            }
            "file" => return Err(ServiceError::invalid("file", "the form has more than one `file`: send one")),
            "purpose" => receipt.purpose = Some(receive_text(&mut field).await?),
            // Such as `expires_after`: files stay until they are deleted.
            _ => drop(receive_text(&mut field).await?),
        }
    }
    Err(ServiceError::invalid("form", format!("the form has more than {MOST_FIELDS} parts: send `purpose` and `file`")))
}

async fn receive_file(field: &mut Field, path: &std::path::Path, limits: &Limits) -> Result<u64, ServiceError> {
    let failed = |error| ServiceError::io(path, error);
    let mut file = tokio::fs::File::create_new(path).await.map_err(failed)?;
    let (mut bytes, mut line) = (0u64, 0usize);
    while let Some(piece) = field.try_next().await.map_err(malformed)? {
        bytes += piece.len() as u64;
        if bytes > limits.upload {
            return Err(ServiceError::TooLarge { what: "file", limit: limits.upload });
        }
        for part in piece.split_inclusive(|&byte| byte == b'\n') {
            line += part.len();
            if line > limits.line {
                return Err(ServiceError::TooLarge { what: "line", limit: limits.line as u64 });
            }
            if part.ends_with(b"\n") {
                line = 0;
            }
        }
        file.write_all(&piece).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    file.sync_all().await.map_err(failed)?;
    Ok(bytes)
}

async fn receive_text(field: &mut Field) -> Result<String, ServiceError> {
    let mut text = Vec::new();
    while let Some(piece) = field.try_next().await.map_err(malformed)? {
        text.extend_from_slice(&piece);
        if text.len() > MOST_TEXT {
            return Err(ServiceError::TooLarge { what: "form field", limit: MOST_TEXT as u64 });
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn malformed(error: actix_multipart::MultipartError) -> ServiceError {
    if let actix_multipart::MultipartError::Payload(error) = &error
        && was_too_slow(error)
    {
        return ServiceError::Slow;
    }
    let message = format!("the form is malformed ({error}): send multipart/form-data with `purpose` and `file`");
    ServiceError::Invalid { message, param: None, code: "invalid_body" }
}
