# Networks trained one by one; `all` asks for none of them.
rule train_student:
    input:
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
        teacher=teacher_of_student,
        control=plain_network_of_student,
    output:
        student="<results>/train_student/{student}/student.safetensors",
        history="<results>/train_student/{student}/history.parquet",
    log:
        "<logs>/train_student/{student}.log",
    benchmark:
        "<benchmarks>/train_student/{student}.tsv"
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        mem_mb=per_attempt(16000),
        runtime=1440,
        gpu=1,
    params:
        settings=settings_of_student("train_student"),
        seed=student_seed,
        teacher=lambda wildcards, input: f"--teacher {input.teacher}" if input.teacher else "",
        control=lambda wildcards, input: f"--control {input.control}" if input.control else "",
    shell:
        "python -m proard.stages.train_student --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --train {input.train:q} --val {input.val:q}"
        " {params.teacher} {params.control}"
        " --student {output.student:q} --history {output.history:q} 2>&1 | tee {log:q}"


rule train_students:
    input:
        collect("<results>/train_student/{student}/student.safetensors", student=STUDENTS),


rule evaluate_student:
    input:
        student=rules.train_student.output.student,
        test=rules.prepare_data.output.test,
    output:
        table="<results>/evaluate_student/{student}/table.parquet",
    log:
        "<logs>/evaluate_student/{student}.log",
    benchmark:
        "<benchmarks>/evaluate_student/{student}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(480),
        gpu=1,
    params:
        settings=settings_of_student("evaluate_student"),
        seed=run.seed,
    shell:
        "python -m proard.stages.evaluate_student --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --student {input.student:q} --test {input.test:q}"
        " --table {output.table:q} 2>&1 | tee {log:q}"


rule evaluate_students:
    input:
        collect("<results>/evaluate_student/{student}/table.parquet", student=STUDENTS),


rule export_trained:
    input:
        student=rules.train_student.output.student,
        table=rules.evaluate_student.output.table,
        test=rules.prepare_data.output.test,
        manifest=rules.prepare_data.output.manifest,
    output:
        weights="<results>/export_trained/{student}/student.safetensors",
        onnx="<results>/export_trained/{student}/student.onnx",
        pt2="<results>/export_trained/{student}/student.pt2",
        card="<results>/export_trained/{student}/card.md",
        parity="<results>/export_trained/{student}/parity.json",
        checksums="<results>/export_trained/{student}/SHA256SUMS",
    log:
        "<logs>/export_trained/{student}.log",
    benchmark:
        "<benchmarks>/export_trained/{student}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(60),
    params:
        settings=settings_of_student("export_trained"),
        seed=run.seed,
    shell:
        "python -m proard.stages.export_trained --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --student {input.student:q} --table {input.table:q}"
        " --test {input.test:q} --manifest {input.manifest:q}"
        " --weights {output.weights:q} --onnx {output.onnx:q} --pt2 {output.pt2:q} --card {output.card:q}"
        " --parity {output.parity:q} --checksums {output.checksums:q} 2>&1 | tee {log:q}"


rule export_trained_students:
    input:
        collect(rules.export_trained.output, student=STUDENTS),


rule compare_students:
    input:
        tables=collect("<results>/evaluate_student/{student}/table.parquet", student=STUDENTS),
        supernet=collect(
            "<results>/select_student/{budget}/student.parquet",
            budget=BUDGETS if run.compare_students.supernet else [],
        ),
    output:
        table="<results>/compare_students/table.parquet",
        summary="<results>/compare_students/summary.parquet",
        accuracy_figure="<results>/compare_students/accuracy.svg",
        own_figure="<results>/compare_students/own_attack.svg",
        eps_figure="<results>/compare_students/eps.svg",
        cost_figure="<results>/compare_students/cost.svg",
    log:
        "<logs>/compare_students.log",
    benchmark:
        "<benchmarks>/compare_students.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=per_attempt(4000),
        runtime=30,
    params:
        settings=settings("compare_students"),
        seed=run.seed,
    shell:
        "python -m proard.stages.compare_students --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --tables {input.tables:q}"
        " --supernet {input.supernet:q} --table {output.table:q}"
        " --summary {output.summary:q} --accuracy-figure {output.accuracy_figure:q}"
        " --own-figure {output.own_figure:q} --eps-figure {output.eps_figure:q}"
        " --cost-figure {output.cost_figure:q} 2>&1 | tee {log:q}"
