use proptest::prelude::*;

use super::*;

pub(crate) fn spec(name: &str, rows: usize, columns: usize, tile_rows: Option<usize>) -> TensorSpec {
    TensorSpec { name: name.into(), rows, columns, tile_rows, decay: true }
}

#[test]
fn wide_kinds_have_two_parts_under_bf16() {
    let layout = Layout::new(&[spec("a", 64, 64, Some(1))], Precision::Bf16, Bytes(4096)).unwrap();
    assert_eq!((layout.group_count(), layout.chunk_count()), (2, 14));
    assert_eq!((layout.parts(Kind::Momentum), layout.parts(Kind::Low), layout.parts(Kind::Master)), (2, 1, 0));
    assert_eq!(layout.chunk_of(GroupId(1), Kind::Variance, 1), Some(ChunkId(12)));
    assert_eq!(layout.chunk_of(GroupId(1), Kind::Gradient, 0), Some(ChunkId(13)));
    assert_eq!(layout.chunk_of(GroupId(2), Kind::Weight, 0), None);
    assert_eq!(layout.chunk_of(GroupId(0), Kind::Master, 0), None);
}

#[test]
fn errors_name_the_tensor_and_the_size_to_set() {
    let new = |specs: &[TensorSpec], size| Layout::new(specs, Precision::Fp32, Bytes(size)).unwrap_err();
    assert_eq!(new(&[], 5000), LayoutError::ChunkSize(Bytes(5000)));
    let large = new(&[spec("big", 1025, 1, None)], 4096);
    assert!(large.to_string().contains("`big`") && large.to_string().contains("8192"), "{large}");
    assert!(matches!(new(&[spec("p", 9, 600, Some(2))], 4096), LayoutError::TooLarge { .. }));
    let twice = [spec("a", 1, 1, None), spec("a", 1, 1, None)];
    assert_eq!(new(&twice, 4096), LayoutError::Duplicate("a".into()));
    assert_eq!(new(&[spec("z", 0, 1, None)], 4096), LayoutError::Empty("z".into()));
    assert_eq!(new(&[spec("z", 1, 1, Some(0))], 4096), LayoutError::EmptyTile("z".into()));
    assert_eq!(new(&[spec("h", usize::MAX, 2, Some(1))], 4096), LayoutError::Overflow("h".into()));
}

proptest! {
    #[test]
    fn tiles_cover_tensors_and_never_overlap(
        shapes in prop::collection::vec((1usize..40, 1usize..30, prop::option::of(1usize..8)), 1..20),
        bf16: bool,
        pages in 2u64..5,
    ) {
        let specs: Vec<_> =
            shapes.iter().enumerate().map(|(i, &(r, c, t))| spec(&i.to_string(), r, c, t)).collect();
        let precision = if bf16 { Precision::Bf16 } else { Precision::Fp32 };
        let layout = Layout::new(&specs, precision, Bytes(pages * 4096)).unwrap();
        for (index, spec) in specs.iter().enumerate() {
            let mut row = 0;
            for tile in layout.tiles(TensorId(index as u32)) {
                prop_assert_eq!(tile.row_start, row);
                prop_assert!(spec.tile_rows.map_or(row == 0, |panel| row % panel == 0));
                row += tile.rows;
            }
            prop_assert_eq!(row, spec.rows);
        }
        let element = precision.element_bytes(Kind::Weight).unwrap();
        for group in (0..layout.group_count() as u32).map(GroupId) {
            let mut end = 0;
            for tile in layout.group_tiles(group) {
                prop_assert!(tile.offset >= end && (tile.offset * element).is_multiple_of(TILE_ALIGNMENT));
                end = tile.offset + tile.rows * specs[tile.tensor.0 as usize].columns;
            }
            prop_assert!(end > 0 && end <= layout.group_capacity());
            prop_assert_eq!(end, layout.group_used(group));
        }
        for info in layout.chunks() {
            prop_assert_eq!(layout.chunk_of(info.group, info.kind, info.part), Some(info.id));
        }
    }
}
