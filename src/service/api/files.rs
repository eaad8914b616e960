//! Stored files: listed, read, deleted.

use actix_web::body::SizedStream;
use actix_web::web::Bytes;
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::stream::unfold;
use tokio::io::AsyncReadExt;

use super::State;
use super::params::{Page, Params, id};
use super::view::{DeletedFile, File, List};
use crate::service::error::ServiceError;
use crate::service::store::{FileId, FileRow};

/// Bytes of a file that are in memory at once.
const PIECE: usize = 64 << 10;

/// Stored files, newest first unless `order` is `asc`.
#[utoipa::path(get, path = "/v1/files", tag = "files",
    params(Page, ("order" = Option<String>, Query, description = "asc or desc"), ("purpose" = Option<String>, Query)),
    responses((status = 200, body = List<File>)))]
pub(super) async fn list(state: web::Data<State>, request: HttpRequest) -> Result<web::Json<List<File>>, ServiceError> {
    let params = Params::of(&request)?;
    let (after, limit) = (params.after::<FileId>()?, params.limit(10_000, 10_000)?);
    let ascending = match params.get("order") {
        None | Some("desc") => false,
        Some("asc") => true,
        Some(_) => return Err(ServiceError::invalid("order", "`order` must be asc or desc")),
    };
    let purpose = params.get("purpose").map(str::to_owned);
    let find = move |store: &_| {
        crate::service::store::Store::files(store, purpose.as_deref(), after.as_ref(), limit, ascending)
    };
    let page = state.store.read(find).await?;
    Ok(web::Json(List::new(page.rows.iter().map(File::from).collect(), page.has_more)))
}

/// One file.
#[utoipa::path(get, path = "/v1/files/{id}", tag = "files", params(("id" = String, Path)),
    responses((status = 200, body = File)))]
pub(super) async fn retrieve(
    state: web::Data<State>,
    path: web::Path<String>,
) -> Result<web::Json<File>, ServiceError> {
    Ok(web::Json(File::from(&find(&state, &path).await?)))
}

/// Deletes a file, unless a job that has not ended needs it.
#[utoipa::path(delete, path = "/v1/files/{id}", tag = "files", params(("id" = String, Path)),
    responses((status = 200, body = DeletedFile)))]
pub(super) async fn delete(
    state: web::Data<State>,
    path: web::Path<String>,
) -> Result<web::Json<DeletedFile>, ServiceError> {
    let file = find(&state, &path).await?;
    let wanted = file.id.clone();
    let removed =
        state.store.write(move |store| Ok(!store.file_in_use(&wanted)? && store.remove_file(&wanted)?)).await?;
    if !removed {
        return Err(ServiceError::Invalid {
            message: format!("file {} is needed by a job that has not ended: cancel the job first", file.id),
            param: None,
            code: "file_in_use",
        });
    }
    // What is left behind if this fails is removed at the next start.
    if let Err(error) = tokio::fs::remove_file(state.settings.file(&file.id)).await {
        tracing::warn!(file = %file.id, "the content of a deleted file is still there: {error}");
    }
    Ok(web::Json(DeletedFile::new(file.id)))
}

/// What is in a file.
#[utoipa::path(get, path = "/v1/files/{id}/content", tag = "files", params(("id" = String, Path)),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream")))]
pub(super) async fn content(state: web::Data<State>, path: web::Path<String>) -> Result<HttpResponse, ServiceError> {
    let row = find(&state, &path).await?;
    let place = state.settings.file(&row.id);
    let file = tokio::fs::File::open(&place).await.map_err(|error| ServiceError::io(&place, error))?;
    Ok(sent(file, row.bytes, "application/octet-stream"))
}

/// A file of so many bytes, piece by piece.
pub(super) fn sent(file: tokio::fs::File, bytes: u64, kind: &'static str) -> HttpResponse {
    let pieces = unfold(file, |mut file| async move {
        let mut piece = vec![0; PIECE];
        match file.read(&mut piece).await {
            Ok(0) => None,
            Ok(count) => {
                piece.truncate(count);
                Some((Ok::<_, actix_web::Error>(Bytes::from(piece)), file))
            }
            Err(error) => Some((Err(error.into()), file)),
        }
    });
    // Never shown as a page, whatever is in it.
    HttpResponse::Ok()
        .content_type(kind)
        .insert_header(("content-disposition", "attachment"))
        .insert_header(("x-content-type-options", "nosniff"))
        .body(SizedStream::new(bytes, Box::pin(pieces)))
}

async fn find(state: &State, text: &str) -> Result<FileRow, ServiceError> {
    let wanted: FileId = id("file", text)?;
    let found = state.store.read(move |store| store.file(&wanted)).await?;
    found.ok_or_else(|| ServiceError::NotFound { what: "file", id: text.to_owned() })
}
