rule search_front:
    input:
        predictor=rules.fit_predictor.output.predictor,
        table=rules.merge_table.output.table,
        device=DEVICE,
    output:
        archive="<results>/search_front/archive.parquet",
        front="<results>/search_front/front.parquet",
        history="<results>/search_front/history.parquet",
    log:
        "<logs>/search_front.log",
    benchmark:
        "<benchmarks>/search_front.tsv"
    conda:
        "../../environment.yml"
    threads: parallel_threads(4)
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(120),
    params:
        settings=settings("search_front"),
        seed=run.seed,
    shell:
        "python -m proard.stages.search_front --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --predictor {input.predictor:q} --table {input.table:q}"
        " --archive {output.archive:q} --front {output.front:q} --history {output.history:q} 2>&1 | tee {log:q}"


rule verify_front:
    input:
        supernet=SUPERNET,
        front=rules.search_front.output.front,
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
        test=rules.prepare_data.output.test,
    output:
        table="<results>/verify_front/front.parquet",
    log:
        "<logs>/verify_front.log",
    benchmark:
        "<benchmarks>/verify_front.tsv"
    priority: 1  # it takes longer than a selection, so it starts first
    conda:
        "../../environment.yml"
    threads: parallel_threads(8)
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(720),
        gpu=1,
    params:
        settings=settings("verify_front"),
        seed=run.seed,
        cache=CACHE,
    shell:
        "python -m proard.stages.verify_front --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --supernet {input.supernet:q} --front {input.front:q}"
        " --train {input.train:q} --val {input.val:q} --test {input.test:q}"
        " --cache {params.cache:q} --table {output.table:q} 2>&1 | tee {log:q}"


rule select_student:
    input:
        archive=searched_archive,
        device=DEVICE,
        supernet=SUPERNET,
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
        test=rules.prepare_data.output.test,
    output:
        student="<results>/select_student/{budget}/student.parquet",
    log:
        "<logs>/select_student/{budget}.log",
    benchmark:
        "<benchmarks>/select_student/{budget}.tsv"
    priority: 1  # the long chain of a student first: all else fills the cores beside it
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(240),
        gpu=1,
    params:
        settings=settings("select_student"),
        seed=run.seed,
        cache=CACHE,
    shell:
        "python -m proard.stages.select_student --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --archive {input.archive:q} --supernet {input.supernet:q}"
        " --train {input.train:q} --val {input.val:q} --test {input.test:q}"
        " --budget {wildcards.budget:q} --cache {params.cache:q} --student {output.student:q} 2>&1 | tee {log:q}"


rule select_students:
    input:
        collect("<results>/select_student/{budget}/student.parquet", budget=BUDGETS),


# The same device and threads as the measurement: the exported network is the measured one, to the last bit. The
# name of an experiment's network, given as the budget, exports that network.
rule export_student:
    input:
        student=rows_to_export,
        trained=weights_to_export,
        supernet=supernet_to_export,
        train=images_to_export,
        test=rules.prepare_data.output.test,
        manifest=rules.prepare_data.output.manifest,
    output:
        weights="<results>/export_student/{budget}/student.safetensors",
        onnx="<results>/export_student/{budget}/student.onnx",
        pt2="<results>/export_student/{budget}/student.pt2",
        hub="<results>/export_student/{budget}/config.json",
        labels="<results>/export_student/{budget}/labels.txt",
        card=report(
            "<results>/export_student/{budget}/card.md",
            caption="../report/card.rst",
            category="Students",
            labels={"budget": "{budget}"},
        ),
        parity="<results>/export_student/{budget}/parity.json",
        checksums="<results>/export_student/{budget}/SHA256SUMS",
    log:
        "<logs>/export_student/{budget}.log",
    benchmark:
        "<benchmarks>/export_student/{budget}.tsv"
    priority: 1  # the long chain of a student first: all else fills the cores beside it
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(60),
        gpu=1,
    params:
        settings=settings("export_student"),
        seed=run.seed,
        network=lambda wildcards, input: flags_of(input, "trained", "supernet", "train"),
    shell:
        "python -m proard.stages.export_student --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --student {input.student:q} {params.network}"
        " --test {input.test:q} --manifest {input.manifest:q} --budget {wildcards.budget:q}"
        " --weights {output.weights:q} --onnx {output.onnx:q} --pt2 {output.pt2:q} --hub {output.hub:q}"
        " --labels {output.labels:q} --card {output.card:q}"
        " --parity {output.parity:q} --checksums {output.checksums:q} 2>&1 | tee {log:q}"


rule export_students:
    input:
        collect(rules.export_student.output, budget=BUDGETS),


# The int8 file of a student, and its robustness on the runtime beside that of the float file.
rule quantize_student:
    input:
        onnx=rules.export_student.output.onnx,
        weights=rules.export_student.output.weights,
        teacher=rules.train_teacher.output.teacher,
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
        test=rules.prepare_data.output.test,
    output:
        int8="<results>/quantize_student/{budget}/student.int8.onnx",
        table="<results>/quantize_student/{budget}/table.parquet",
        card="<results>/quantize_student/{budget}/card.md",
    log:
        "<logs>/quantize_student/{budget}.log",
    benchmark:
        "<benchmarks>/quantize_student/{budget}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(240),
        gpu=1,
    params:
        settings=settings("quantize_student"),
        seed=run.seed,
    shell:
        "python -m proard.stages.quantize_student --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --onnx {input.onnx:q} --weights {input.weights:q}"
        " --teacher {input.teacher:q} --train {input.train:q} --val {input.val:q} --test {input.test:q}"
        " --budget {wildcards.budget:q} --int8 {output.int8:q} --table {output.table:q}"
        " --card {output.card:q} 2>&1 | tee {log:q}"


rule quantize_students:
    input:
        collect(rules.quantize_student.output, budget=BUDGETS),


rule executorch_student:
    input:
        weights=weights_for_executorch,
        train=rules.prepare_data.output.train,
        test=rules.prepare_data.output.test,
    output:
        float="<results>/executorch_student/{budget}/student.pte",
        int8="<results>/executorch_student/{budget}/student.int8.pte",
        parity="<results>/executorch_student/{budget}/parity.json",
        table="<results>/executorch_student/{budget}/table.parquet",
    log:
        "<logs>/executorch_student/{budget}.log",
    benchmark:
        "<benchmarks>/executorch_student/{budget}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(240),
    params:
        settings=settings("executorch_student"),
        seed=run.seed,
    shell:
        "python -m proard.stages.executorch_student --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --weights {input.weights:q}"
        " --train {input.train:q} --test {input.test:q} --budget {wildcards.budget:q}"
        " --float {output.float:q} --int8 {output.int8:q} --parity {output.parity:q}"
        " --table {output.table:q} 2>&1 | tee {log:q}"


rule executorch_students:
    input:
        collect(rules.executorch_student.output, budget=BUDGETS),


rule export_experiments:
    input:
        collect(rules.export_student.output, budget=ALONE),
